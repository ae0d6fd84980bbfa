"""MkDocs hooks that turn README.md, the changelog and the examples into pages and adjust their links."""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
TUTORIAL = "- [tutorial.py](../docs/tutorial.md): the tutorial, which is also a notebook."
CLUSTER = "- [cluster](cluster): a job for torchrun and SLURM that survives preemption."
KINDS = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".env": "bash"}


def sources():
    """Yield the generated pages: the path in the repository, the path of the page, and its text."""
    for source, page in PAGES.items():
        yield source, page, (ROOT / source).read_text(encoding="utf-8")
    quickstart, tutorial = (ROOT / "examples" / name for name in ("quickstart.py", "tutorial.py"))
    programs = sorted(set((ROOT / "examples").glob("*.py")) - {quickstart, tutorial})
    lines = ["# Examples\n", entry(quickstart), TUTORIAL, *map(entry, programs), CLUSTER]
    yield "examples", "examples/index.md", "\n".join(lines)
    programs.append(quickstart)
    for path in programs:
        yield f"examples/{path.name}", f"examples/{path.stem}.md", example(path)
    for readme in sorted((ROOT / "examples").glob("*/README.md")):
        files = sorted(path for path in readme.parent.iterdir() if path.suffix in KINDS)
        text = readme.read_text(encoding="utf-8") + "".join(f"\n## {path.name}\n\n{fenced(path)}" for path in files)
        yield f"examples/{readme.parent.name}", f"examples/{readme.parent.name}.md", text
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        yield f"examples/{path.name}", f"examples/{path.stem}_yaml.md", f"# {path.name}\n\n{fenced(path)}"


def entry(path):
    """One line in the list of examples."""
    return f"- [{path.name}]({path.name}): {docstring(path).splitlines()[0]}"


def example(path):
    """The page of an example: its docstring and its code."""
    return f"# {path.name}\n\n{docstring(path)}\n\n{fenced(path)}"


def title(file):
    """The title of a page up to a colon, which replaces the name of its file in links."""
    return re.search(r"^# ([^:\n]*)", file.content_string, flags=re.MULTILINE)[1]


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def fenced(path):
    return f"```{KINDS[path.suffix]}\n{path.read_text(encoding='utf-8')}```\n"


def on_files(files, config):
    for _, page, text in sources():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Convert links within the repository to links between pages; keep only the text of all others."""
    page_of = {source: target for source, target, _ in sources()}
    source_of = {target: source for source, target in page_of.items()}
    source = source_of.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = source if (ROOT / source).is_dir() else posixpath.dirname(source)

    def replace(match):
        text, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target)).removesuffix("/README.md")
        linked = page_of.get(path) or (path[len("docs/") :] if path.startswith("docs/") else None)
        if linked is None or files.get_file_from_path(linked) is None:
            return text.strip("![]")
        if re.fullmatch(r"\[[\w./]+\.md\]", text):
            text = f"[{title(files.get_file_from_path(linked))}]"
        return f"{text}({posixpath.relpath(linked, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(replace, markdown)


LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
