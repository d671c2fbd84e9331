"""Everything is declared in pyproject.toml but the compiled extension: csrc/ becomes red_kernels/_csrc.so, where that can be built.

RED_BUILD_CUDA=auto|0|1: with its CUDA part if there is an nvcc that works; never; always, or the installation fails. Without a compiler, ninja or torch
the package is installed all the same, and its ops run in PyTorch.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent / "csrc"


class BuildLibrary(build_ext):
    def get_ext_filename(self, name):
        return "/".join(name.split(".")) + ".so"  # no interpreter's tag: the library knows nothing of Python

    def build_extension(self, extension):
        sys.path.insert(0, str(SOURCES))
        import build

        cuda = build.cuda_choice()
        output = Path(self.get_ext_fullpath(extension.name))
        try:
            print(f"red: {output.name} built: {build.build(output, Path(self.build_temp).resolve() / 'csrc', cuda)}")
        except build.CannotBuild as error:
            if cuda == "1":
                raise
            extension.missing = True
            print(f"red: the compiled extension is left out, and erank runs in PyTorch, slower: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        self.extensions = [extension for extension in self.extensions if not getattr(extension, "missing", False)]
        super().copy_extensions_to_source()

    def get_outputs(self):
        return [output for output in super().get_outputs() if Path(output).exists()]

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}


extensions = [Extension("red_kernels._csrc", [])] if SOURCES.is_dir() else []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibrary})
