"""Programs that need no Torch, which TVM-FFI imports where it is installed: that takes more time than most programs."""

WITHOUT_TORCH = 'import sys; sys.modules["torch"] = None\n'
