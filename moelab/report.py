"""Run a notebook with parameters and render it as one HTML file.

papermill runs it, nbconvert renders it with the template in `moelab/template`.
The file holds its figures, styles and scripts: it opens offline, from a mail.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import disk, inert
from .parameters import ParameterError, assignments, parameters_of, unknown_parameters

_HERE = Path(__file__).resolve().parent
_REMOVE_CELL = {"remove_cell", "remove-cell"}
_REMOVE_INPUT = {"hide-input", "hide_input", "remove-input", "remove_input"}
_FAILURE_MARK = "papermill-error-cell-tag"


class ReportError(RuntimeError):
    """A notebook that failed, or whose files can't be written.

    Attributes:
        notebook: the partial executed notebook, None if nothing ran.
        html: the partial report, None if there is none.
    """

    def __init__(
        self, message: str, notebook: Path | None = None, html: Path | None = None
    ) -> None:
        super().__init__(message)
        self.notebook = notebook
        self.html = html


def render(
    notebook: str | Path,
    parameters: Mapping[str, object],
    out_dir: Path,
    *,
    name: str = "",
    progress: bool = True,
) -> Path:
    """Run a notebook and render its report.

    Args:
        notebook: a path, or a bare name that `available` lists.
        parameters: values of the notebook's parameters, by name: None, bool,
            int, float, str, Path, or list, tuple and dict of these.
        out_dir: folder of ``<name>.ipynb`` (executed) and ``<name>.html``.
        name: of both files, as `inert.is_file_name` has it; if empty, the notebook's stem.
        progress: show a progress bar on stderr.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: there is no such notebook; the message lists them.
        ParameterError: a name or a value doesn't fit; nothing ran.
        DiskFullError: there is no room; what was there before stays.
        ReportError: a cell failed; both files hold what was done before. Or
            ``out_dir`` is the notebook's own folder; nothing ran.
    """
    if name and not inert.is_file_name(name):
        raise ParameterError(
            f"{name!r} is no name of a report's files: give letters, digits, '.', '_' and '-', at "
            "most 64, such as gfx942_stages; --out says in which folder"
        )
    source = find(notebook)
    values = _checked(source, parameters)
    out_dir = Path(out_dir)
    name = name or source.stem
    executed, html = out_dir / f"{name}.ipynb", out_dir / f"{name}.html"
    if executed.resolve() == source.resolve():
        raise ReportError(f"{executed} is the notebook itself; pass another out_dir")
    disk.make_folder(out_dir)

    import papermill

    from . import engine  # noqa: F401 - registers itself, also where moelab isn't installed

    # papermill warns about names that it can't read from the parameters cell
    # (`x: str = "a=b"`), which are checked above, and logs a dead kernel, which
    # is raised below.
    log = logging.getLogger("papermill")
    level = log.level
    log.setLevel(logging.CRITICAL)
    # papermill writes it after each cell, wherever it may be cut off.
    partial = out_dir / f".{name}.{os.getpid()}.ipynb"
    try:
        with disk.room_at(partial):
            papermill.execute_notebook(
                _literal(source),
                _literal(partial),
                values,
                engine_name="moelab",
                kernel_name="python3",
                language="python",
                progress_bar=progress,
            )
        _keep(partial, executed)
    except papermill.PapermillExecutionError as error:
        if error.ename == disk.DiskFullError.__name__:
            raise disk.DiskFullError(error.evalue) from None
        _keep(partial, executed)
        to_html(executed, html)
        raise ReportError(
            f"{source.name}: cell [{error.exec_count or '?'}] raised "
            f"{_one_line(error.ename, error.evalue)}\n"
            f"  what ran before: {html}\n"
            f"  executed notebook: {executed}",
            executed,
            html,
        ) from error
    finally:
        log.setLevel(level)
        partial.unlink(missing_ok=True)
    return to_html(executed, html)


def _keep(partial: Path, executed: Path) -> None:
    """Let a notebook that ran take its place."""
    import nbformat

    nb = nbformat.read(partial, as_version=4)
    nb.metadata.papermill.output_path = str(executed)
    disk.replace(executed, nbformat.writes(nb))


def render_to(notebook: str | Path, parameters: Mapping[str, object], html: Path) -> Path:
    """Run a notebook and put its report, whole or not at all, in one file.

    Args:
        notebook, parameters: as of `render`.
        html: the file to write; a report that is there is replaced, nothing else is.

    Returns:
        ``html``.

    Raises:
        ValueError: as of `require_report_or_nothing`.
        OSError: the file can't be written.
        FileNotFoundError, ParameterError, ReportError: as `render`; nothing is written.
    """
    require_report_or_nothing(html)
    # Beside the file, so that it takes its place in one step; and nobody waits for a report
    # that can't be written.
    with tempfile.TemporaryDirectory(prefix=f".{html.stem}", dir=html.parent) as folder:
        try:
            made = render(notebook, parameters, Path(folder), name="report", progress=False)
        except ReportError as error:
            # What ran before goes with the folder.
            raise ReportError(str(error).splitlines()[0]) from None
        made.replace(html)
    return html


def require_report_or_nothing(html: Path) -> None:
    """Refuse a file that a report must not replace.

    Raises:
        ValueError: its name is no page's, its folder is not there, or what is there is no
            report of moelab.
    """
    if html.suffix not in (".html", ".htm"):
        raise ValueError(f"{html}: a report is a page; name it {html.with_suffix('.html')}")
    if not html.parent.is_dir():
        raise ValueError(f"{html}: there is no folder {html.parent}; make it first")
    if html.exists() and not _is_report(html):
        raise ValueError(f"{html}: is there and is no report of moelab; choose another name")


def _is_report(path: Path) -> bool:
    """Say whether a file is one of `to_html`, by the line in its head that says so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return (
        re.search(
            rb'<meta [^>]*content="moelab"[^>]*name="generator"|'
            rb'<meta [^>]*name="generator"[^>]*content="moelab"',
            head,
        )
        is not None
    )


def to_html(executed_ipynb: Path, html: Path) -> Path:
    """Render an executed notebook as one HTML file that needs no network.

    Args:
        executed_ipynb: a notebook with its outputs.
        html: the file to write; its folder exists.

    Returns:
        ``html``.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    executed_ipynb, html = Path(executed_ipynb), Path(html)
    nb = nbformat.read(executed_ipynb, as_version=4)
    facts = _facts(nb, executed_ipynb.stem) | {"script": _hash_of_script()}
    exporter = HTMLExporter(
        template_name="template",
        extra_template_basedirs=[str(_HERE)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        # Pictures of markdown cells that lie next to the notebook.
        embed_images=True,
        config=Config(
            TagRemovePreprocessor={
                "remove_cell_tags": _REMOVE_CELL | {_FAILURE_MARK},
                "remove_input_tags": _REMOVE_INPUT,
            },
            # No widgets and no LaTeX: offline they show nothing, their text does.
            NbConvertBase={
                "display_data_priority": [
                    "text/html",
                    "text/markdown",
                    "image/svg+xml",
                    "image/png",
                    "image/jpeg",
                    "text/plain",
                ]
            },
        ),
    )
    resources = {
        "moelab": facts,
        "metadata": {
            "name": executed_ipynb.stem,
            "path": str(_pictures_folder(nb, executed_ipynb)),
        },
    }
    body, _ = exporter.from_notebook_node(nb, resources)
    disk.replace(html, inert.page(_finish(body)))
    return html


def _hash_of_script() -> str:
    """Name the report's one script as its policy does: any other does not run."""
    # As `include_js` writes it between the tags.
    script = "\n" + (_HERE / "template" / "report.js").read_text(encoding="utf-8")
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def available() -> dict[str, Path]:
    """Return the notebooks that a bare name finds, ``{stem: path}``.

    The checkout's `notebooks` folder comes first, then the current directory
    and its own `notebooks` folder.
    """
    folders = (_HERE.parent / "notebooks", Path(), Path("notebooks"))
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.ipynb")):
            found.setdefault(path.stem, path)
    return found


def find(notebook: str | Path) -> Path:
    """Return the path of a notebook, given as a path or a bare name.

    Raises:
        FileNotFoundError: there is none; the message lists those there are.
    """
    path = Path(notebook)
    if path.is_file():
        return path
    notebooks = available()
    stem = path.name.removesuffix(".ipynb")
    if len(path.parts) == 1 and stem in notebooks:
        return notebooks[stem]

    import difflib

    near = difflib.get_close_matches(stem, list(notebooks), n=1)
    hint = f" did you mean {near[0]}?" if near else ""
    names = ", ".join(notebooks) or "none, run from the checkout or pass a path"
    raise FileNotFoundError(f"no notebook {str(notebook)!r};{hint} There are: {names}")


def _checked(source: Path, parameters: Mapping[str, object]) -> dict[str, Any]:
    """Return the values as papermill takes them, or raise ParameterError."""
    defined = parameters_of(source)
    if unknown := [name for name in parameters if name not in defined]:
        lines = [f"{source.name}: {unknown_parameters(unknown, defined)}"]
        lines += [
            f"  {p.name}: {p.type} = {p.default}" + (f"  # {p.help}" if p.help else "")
            for p in defined.values()
        ]
        raise ParameterError("\n".join(lines))
    return {name: _plain(name, value) for name, value in parameters.items()}


def _plain(name: str, value: object) -> Any:
    """Return a value that papermill writes as the literal it is.

    papermill writes any other type, a tuple too, as the string of its repr.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, item) for key, item in value.items()}
    raise ParameterError(
        f"{name}: {value!r} is {type(value).__name__}; pass None, bool, int, float, str, "
        "Path, or list, tuple and dict (keys str) of these"
    )


def _literal(path: Path) -> str:
    """Protect braces: papermill fills parameters into paths by `str.format`."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _one_line(ename: str, evalue: str) -> str:
    """Shorten an error to one line."""
    first = (evalue.strip().splitlines() or [""])[0]
    first = first if len(first) <= 300 else first[:299] + "…"
    return f"{ename}: {first}" if first else ename


def _facts(nb: Any, stem: str) -> dict[str, Any]:
    """Return what the template says about the run, and make failures visible."""
    run = nb.metadata.get("papermill", {})
    facts: dict[str, Any] = {
        "title": stem,
        "date": (run.get("end_time") or "")[:16].replace("T", " "),
        "duration": _duration(run.get("duration")),
        "error": None,
        "parameters": [],
        "parameters_code": "",
        "parameters_cell": None,
        "changed": [],
    }
    headings = [
        match
        for cell in nb.cells
        if cell.cell_type == "markdown" and _FAILURE_MARK not in cell.metadata.get("tags", [])
        for match in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", cell.source, re.MULTILINE)
    ]
    if headings:
        facts["title"] = re.sub(r"[`*_]{1,2}(\S.*?)[`*_]{1,2}", r"\1", headings[0])

    by_tag: dict[str, Any] = {}
    for index, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags", [])
        for tag in ("parameters", "injected-parameters"):
            if tag in tags and cell.cell_type == "code":
                by_tag.setdefault(tag, cell)
        errors = [o for o in cell.get("outputs", []) if o.output_type == "error"]
        if errors:
            # What failed is shown, also where the cell asks to be hidden.
            cell.metadata["tags"] = [t for t in tags if t not in _REMOVE_CELL | _REMOVE_INPUT]
            cell.metadata["moelab_failed"] = True
            cell.setdefault("id", f"cell-{index}")
            facts["error"] = {
                "text": _one_line(errors[0].ename, errors[0].evalue),
                "cell": f"cell-id={cell.id}",
            }
    if cells := list(by_tag.values()):
        try:
            rows = [assignments(cell.source) for cell in cells]
        except SyntaxError:
            return facts
        defaults, values = rows[0], rows[-1] if len(rows) > 1 else {}
        for name, parameter in ({**defaults, **values} | defaults).items():
            value = values.get(name, parameter).default
            changed = not _same_literal(value, parameter.default) or name not in defaults
            row = {"name": name, "value": value, "help": parameter.help, "changed": changed}
            facts["parameters"].append(row | {"default": parameter.default})
            if changed:
                facts["changed"].append(f"{name} = {value}")
        facts["parameters_cell"] = cells[-1].get("id")
        facts["parameters_code"] = "\n\n".join(cell.source.strip() for cell in cells)
    return facts


def _same_literal(left: str, right: str) -> bool:
    """Whether two pieces of source are the same value: ``'a'`` and ``"a"`` are."""
    return ast.dump(ast.parse(left, mode="eval")) == ast.dump(ast.parse(right, mode="eval"))


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _pictures_folder(nb: Any, executed: Path) -> Path:
    """Return the folder that a markdown cell's pictures are relative to."""
    source = nb.metadata.get("papermill", {}).get("input_path")
    return Path(source).parent if source and Path(source).is_file() else executed.parent


def _finish(html: str) -> str:
    """Number the headings, fill in the contents, alt texts and table boxes."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for image in soup.select("img[data-alt-from-heading]"):
        del image["data-alt-from-heading"]
        heading = image.find_previous(["h1", "h2", "h3", "h4", "h5", "h6"])
        image["alt"] = f"Figure: {heading.get_text(' ', strip=True)}" if heading else "Figure"
    used: set[str] = {tag["id"] for tag in soup.select("[id]")}
    contents = []
    for heading in soup.select(".markdown :is(h1, h2, h3, h4)"):
        text = heading.get_text(" ", strip=True)
        slug = base = re.sub(r"[^\w]+", "-", text.lower()).strip("-") or "section"
        number = 2
        while slug in used:
            slug, number = f"{base}-{number}", number + 1
        used.add(slug)
        heading["id"] = slug
        contents.append((int(heading.name[1]), slug, text))
        anchor = soup.new_tag("a", href=f"#{slug}", attrs={"class": "anchor", "title": "Link"})
        anchor.string = "#"
        heading.append(anchor)
    for place in soup.select(".toc-list"):
        for level, slug, text in contents:
            item = soup.new_tag("li", attrs={"class": f"level-{level}"})
            link = soup.new_tag("a", href=f"#{slug}")
            link.string = text
            item.append(link)
            place.append(item)
    if len(contents) < 2:
        for toc in soup.select(".toc"):
            toc.decompose()
        soup.body["class"] = [*soup.body.get("class", []), "no-toc"]
    # A policy does not hold a page back from another address, or from looking one up; Chromium
    # connects to a frame's before it refuses the frame.
    for tag in soup.select("main :is(meta, link, base, iframe, object, embed)"):
        tag.decompose()
    # pandas repeats this style with each table, and `scoped` is no longer a thing.
    for style in soup.select(".outputs style[scoped]"):
        style.decompose()
    for table in soup.select(".outputs table, .markdown table"):
        if table.find_parent("table") is None:
            table.wrap(soup.new_tag("div", attrs={"class": "table-box", "tabindex": "0"}))
    return str(soup)
