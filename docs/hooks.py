"""For MkDocs: README.md is the first page, the changelog and the examples are pages, and links go on working."""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
CLUSTER = "- [cluster](cluster): a job for torchrun and SLURM that survives preemption."
KINDS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".env": "bash"}


def sources():
    """Pages that are made, by their path in the repository: the path of the page and its text."""
    for source, page in PAGES.items():
        yield source, page, (ROOT / source).read_text(encoding="utf-8")
    programs = sorted((ROOT / "examples").glob("*.py"))
    yield "examples", "examples/index.md", "\n".join(["# Examples\n", *map(entry, programs), CLUSTER])
    for path in programs:
        yield f"examples/{path.name}", f"examples/{path.stem}.md", example(path)
    for readme in sorted((ROOT / "examples").glob("*/README.md")):
        files = sorted(path for path in readme.parent.iterdir() if path.suffix in KINDS)
        text = readme.read_text(encoding="utf-8") + "".join(f"\n## {path.name}\n\n{fenced(path)}" for path in files)
        yield f"examples/{readme.parent.name}", f"examples/{readme.parent.name}.md", text
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        yield f"examples/{path.name}", f"examples/{path.stem}_yaml.md", f"# {path.name}\n\n{fenced(path)}"


def entry(path):
    """A line of the list of examples."""
    return f"- [{path.name}]({path.name}): {docstring(path).splitlines()[0]}"


def example(path):
    """What the program says of itself, and the program."""
    return f"# {path.name}\n\n{docstring(path)}\n\n{fenced(path)}"


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def fenced(path):
    return f"```{KINDS[path.suffix]}\n{path.read_text(encoding='utf-8')}```\n"


def on_files(files, config):
    for _, page, text in sources():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links that are right in the repository be right here, and leave the others as text."""
    made = {source: target for source, target, _ in sources()}
    home = {target: source for source, target in made.items()}
    here = home.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = here if (ROOT / here).is_dir() else posixpath.dirname(here)

    def replace(match):
        text, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        found = made.get(path) or (path[len("docs/") :] if path.startswith("docs/") else None)
        if found is None or files.get_file_from_path(found) is None:
            return text.strip("![]")
        return f"{text}({posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(replace, markdown)


LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
