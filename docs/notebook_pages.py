"""MkDocs hooks: every notebook is a page like the others, made by Jupyter's own nbconvert, with its outputs.

The page is Markdown, so it has the site's search, anchors, copy buttons and checks of links. `download/NAME.ipynb` is
the file itself.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from traitlets.config import Config

# nbconvert's own, but for: classes of a block, the description of a picture (`alt` of the cell), cells that install.
TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{%- block stream %}
~~~~~~~~ { .text .output }
{{ output.text | strip_ansi }}
~~~~~~~~
{% endblock stream -%}
{%- block data_png %}
![{{ cell.metadata.alt }}](data:image/png;base64,{{ output.data['image/png'] | replace('\\n', '') }})
{% endblock data_png -%}
"""
SETTINGS = Config(
    MarkdownExporter={"preprocessors": []},  # pictures stay in the page
    TagRemovePreprocessor={"enabled": True, "remove_cell_tags": {"install"}},
)


class Notebook(File):
    """A notebook, which is a page."""

    def is_documentation_page(self) -> bool:
        """Not a file to copy."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make pages of the notebooks, and keep the files for those who want to run them."""
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(file.src_uri)
        files.remove(file)
        files.append(Notebook(file.src_uri, file.src_dir, file.dest_dir, file.use_directory_urls))
        copy = str(path.parent / "download" / path.name)
        files.append(File.generated(config, copy, abs_src_path=file.abs_src_path))


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """The Markdown of a notebook; any other page is read as it is."""
    if not isinstance(page.file, Notebook):
        return None
    exporter = MarkdownExporter(config=SETTINGS, raw_template=TEMPLATE)
    text, _ = exporter.from_filename(page.file.abs_src_path)
    title, rest = text.strip().split("\n", 1)
    return f"{title}\n\n[Download this notebook](download/{PurePosixPath(page.file.src_uri).name})\n{rest}\n"
