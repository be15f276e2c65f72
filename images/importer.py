"""How the guest's Python finds its modules: in one file, and some of them not before they are used.

Every path that an emulated guest looks up, and every line of code that it runs for the first time, costs boot time.
So all byte code is in `modules` beside this file (images/bytecode.py writes it): 4 bytes with the length of the
index, the index (marshal: name -> offset, size, is a package, is lazy), then one marshalled code object per module.

`dataclass` and `namedtuple` write functions as text and have it compiled. What they write when the agent is
imported is in the archive as well, already compiled: under TEXTS, a dict of mode and text to code object.

A lazy module stands in sys.modules empty; its code runs when an attribute is asked for that it has not. That is
not safe against two threads that ask first at the same time: the agent's threads use no lazy module.

This file imports only what the interpreter has loaded already: there is nothing yet that could find more.
"""

import sys
from _frozen_importlib import ModuleSpec
from marshal import loads
from posix import O_CLOEXEC, O_RDONLY, pread
from posix import open as open_file

TEXTS = "<texts>"
"""In the index; no module can have this name."""

Index = dict[str, tuple[int, int, bool, bool]]
ModuleType = type(sys)
CodeType = type((lambda: 0).__code__)


class LazyModule(ModuleType):
    """Imported, but its code has not run."""

    def __getattr__(self, name: str) -> object:
        self.__class__ = ModuleType
        spec = self.__spec__
        assert spec is not None and isinstance(spec.loader, Archive)
        try:
            spec.loader.run(self)
        except BaseException:
            self.__class__ = LazyModule
            raise
        return getattr(self, name)


class Texts:
    """Stands for `compile` in modules that make code of text."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], object] = {}
        self.unknown: list[tuple[str, str]] | None = None
        """Mode and text of what had to be compiled, when a build wants to know."""

    def compiled(self, text: str | CodeType, mode: str) -> object:
        if not isinstance(text, str):
            return text  # which may be evaluated as well
        code = self.known.get((mode, text))
        if code is None:
            code = compile(text, "<string>", mode, 0, True)
            if self.unknown is not None:
                self.unknown.append((mode, text))
        return code


texts = Texts()


class Archive:
    """Finder and loader (importlib.abc's MetaPathFinder and Loader, which would have to be imported themselves)."""

    def __init__(self, path: str) -> None:
        self._file = open_file(path, O_RDONLY | O_CLOEXEC)
        length = int.from_bytes(pread(self._file, 4, 0), "little")
        self.index: Index = loads(pread(self._file, length, 4))  # noqa: S302  # ours
        self._start = 4 + length

    def texts(self) -> dict[tuple[str, str], object]:
        """What TEXTS has."""
        offset, size, _, _ = self.index[TEXTS]
        found: dict[tuple[str, str], object] = loads(pread(self._file, size, self._start + offset))  # noqa: S302  # ours
        return found

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        entry = self.index.get(name)
        return None if entry is None else ModuleSpec(name, self, is_package=entry[2])  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The import system makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        if self.index[module.__spec__.name][3]:
            module.__class__ = LazyModule
        else:
            self.run(module)

    def run(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        offset, size, _, _ = self.index[module.__spec__.name]
        exec(loads(pread(self._file, size, self._start + offset)), module.__dict__)  # noqa: S102, S302  # ours


def install() -> None:
    """Look modules up in the archive from now on; what is not in it is an extension."""
    folder = __file__.rpartition("/")[0]
    sys.path[:] = [f"{folder}/lib-dynload"]
    archive = Archive(f"{folder}/modules")
    texts.known = archive.texts()
    sys.meta_path.insert(-1, archive)  # type: ignore[arg-type]  # before the path's finder
