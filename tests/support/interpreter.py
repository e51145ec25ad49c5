"""Triton's interpreter without work that it repeats at every call; what kernels compute stays the same."""

import functools


def spare_repetitions() -> None:
    """Let functions that a kernel calls find Triton's language as the kernel's launch has left it.

    For a launch the interpreter puts functions of its own in the place of the language's, and takes them out again
    after it. It does the former at every call of a function within the kernel too, where nothing is left to replace:
    a third of the time of kernels like ours. Nor is a table of types made anew whenever one is looked up. Versions of
    Triton that do these in another way are left as they are.
    """
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, type_of = interpreter._patch_lang, interpreter._get_np_dtype
    known = functools.cache(type_of)

    @functools.cache
    def languages(function):
        return [module for module in (language, language.core) if module in function.__globals__.values()]

    def patch_once(function):
        found = languages(function)
        if found and not any(language.core.is_builtin(module.arange) for module in found):
            return interpreter._LangPatchScope()  # which has nothing to take out
        return patch(function)

    def number_type(given):
        scalar = given.scalar
        return type_of(scalar) if isinstance(scalar, language.pointer_type) else known(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, number_type
