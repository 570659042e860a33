"""The notebook as a page of the site: a hook of mkdocs, which mkdocs.yml names."""

from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"


def on_files(files, config):
    """The notebook's text, code and outputs, with its pictures beside."""
    text, resources = MarkdownExporter().from_filename(NOTEBOOK)
    files.append(File.generated(config, "notebook.md", content=text))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    if copied := files.get_file_from_path(NOTEBOOK.name):
        files.remove(copied)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to the notebook lead to its page."""
    return markdown.replace(f"({NOTEBOOK.name})", "(notebook.md)")
