"""A mkdocstrings extension that converts the reStructuredText in this package's docstrings to Markdown."""

import re

from griffe import Extension


class Markdown(Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.is_alias or obj.docstring is None:
            return
        text = re.sub(r":(?:class|func|mod|meth|attr):`~?([\w.]+)`", self.reference, obj.docstring.value)
        obj.docstring.value = re.sub(r"^( *)Example::\s*$", r"\1Examples:", text, flags=re.MULTILINE)

    def reference(self, match):
        path = match[1]
        return f"`{path.rpartition('.')[2]}`"
