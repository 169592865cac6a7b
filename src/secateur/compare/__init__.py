"""Two models -> a local web page that shows them side by side."""
