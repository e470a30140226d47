"""mkdocs hooks of `make docs`: the package under its name, links into the repository, [`Name`] in docstrings."""

import re
import shutil
import tomllib
from pathlib import Path

import griffe
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / ".cache" / "docs" / "lorgnette"  # the package under its import name
OUTWARD = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")  # a link to a file outside docs/
NAME = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
logger = get_plugin_logger("hooks")  # in strict mode a warning fails the build


def on_startup(**_):  # before on_config, where mkdocstrings keeps the search paths that exist
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    for source in [*ROOT.glob("*.py"), *(ROOT / name.partition(".")[2] for name in packages if "." in name)]:
        (PACKAGE / source.name).symlink_to(source)


def on_page_markdown(markdown, page, config, files):
    def link(match):
        path = Path(page.file.abs_src_path).parent.joinpath(match[1]).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.exists():
            return match[0]  # mkdocs checks it
        name = path.relative_to(ROOT).as_posix()
        if path.suffix != ".png":
            return f"]({config.repo_url}/blob/main/{name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"]({name}"

    return OUTWARD.sub(link, markdown)


class Names(griffe.Extension):
    """Turns [`Name`] into a link if the reference has that name; warns about names that are not in the package."""

    def on_package(self, *, pkg, **_):
        objects = [pkg]
        for item in objects:  # it grows during the loop
            objects += [member for member in item.members.values() if not member.is_alias]
        paths = {}
        for path in reversed([item.path.split(".") for item in objects]):  # of two objects with one name the outer one
            paths |= {".".join(path[start:]): ".".join(path) for start in range(len(path))}
        for item in objects:
            if item.docstring:
                item.docstring.value = NAME.sub(
                    lambda name, item=item: linked(name[1], item, paths), item.docstring.value
                )


def linked(name, item, paths):
    path = paths.get(f"{item.path}.{name}") or paths.get(f"{item.path.rpartition('.')[0]}.{name}") or paths.get(name)
    if path is None:
        logger.warning(f"{item.path}: its docstring names {name}, which the package does not have")
    return f'<autoref optional identifier="{path}">`{name}`</autoref>'
