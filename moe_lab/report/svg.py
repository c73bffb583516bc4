"""An SVG that matplotlib wrote, made fit for a page: small, in the page's colours and font, with ids of its own."""

import re
from xml.etree import ElementTree

from moe_lab.report.look import VARIABLES

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
TAGS = {"svg", "g", "defs", "clipPath", "rect", "path", "use", "text", "image"}  # what our figures are made of
FONT = re.compile(r"font: ?(?:[a-z]+ )*([\d.]+)px[^;]*")
LONG = re.compile(r"-?\d+\.\d{2,}")
COLOUR = re.compile("|".join(VARIABLES))
REFERENCE = re.compile(r"url\(#([\w-]+)\)")


def fit(source: bytes, prefix: str, alt: str) -> str:
    """The `svg` element as text; every name in it is escaped, and nothing but drawing is left."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(source)
    _keep_drawing(root)
    used = {value[1:] for node in root.iter() if (value := node.get(f"{{{XLINK}}}href"))}
    used |= {name for node in root.iter() for value in node.attrib.values() for name in REFERENCE.findall(value)}
    for node in root.iter():
        node.attrib = {key: value for name, old in node.attrib.items() for key, value in _kept(name, old, used, prefix)}
    root.attrib |= {"role": "img", "aria-label": alt}
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _keep_drawing(node: ElementTree.Element) -> None:
    for child in list(node):
        if not isinstance(child.tag, str) or child.tag.removeprefix(f"{{{SVG}}}") not in TAGS:
            node.remove(child)
        else:
            _keep_drawing(child)
            child.tail = None
    if node.tag != f"{{{SVG}}}text":
        node.text = None


def _kept(name: str, value: str, used: set[str], prefix: str) -> list[tuple[str, str]]:
    if name == "id":
        return [("id", f"{prefix}-{value}")] if value in used else []
    if name == f"{{{XLINK}}}href":
        return [("href", f"#{prefix}-{value[1:]}")]
    if name == "style":
        value = COLOUR.sub(lambda found: VARIABLES[found[0]], FONT.sub(r"font-size: \1px", value))
    value = REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    return [(name, LONG.sub(_short, value).replace("\n", " "))]


def _short(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
