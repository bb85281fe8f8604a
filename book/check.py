"""Check rendered pages: links and anchors resolve, images say what they show, and nothing is loaded from another host."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

# Tag -> attributes from which a browser loads something without being asked.
LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
LINK_LOADS = {"stylesheet", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "icon", "manifest"}
REMOTE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
REMOTE_IN_CSS = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
REMOTE_IN_SCRIPT = re.compile(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w./@-]*\.(?:m?js|css|woff2?|json)\b", re.IGNORECASE)
FILE_NAME = re.compile(r"^[\w./-]+\.(?:png|svg|jpe?g|gif|webp)$", re.IGNORECASE)


def remote_loads(page: BeautifulSoup) -> Iterator[str]:
    """Addresses on other hosts that a browser fetches when it shows the page."""
    for name, attributes in LOADS.items():
        for tag in page.find_all(name):
            for address in (str(tag[a]) for a in attributes if tag.has_attr(a)):
                yield from (part for part in address.split(",") if REMOTE.match(part))
    for tag in page.find_all("link"):
        if LINK_LOADS & set(tag.get("rel") or []) and REMOTE.match(str(tag.get("href", ""))):
            yield str(tag["href"])
    for tag in page.find_all(style=True):
        yield from REMOTE_IN_CSS.findall(str(tag["style"]))
    for tag in page.find_all("style"):
        yield from REMOTE_IN_CSS.findall(tag.get_text())
    for tag in page.find_all("script", src=False):
        yield from (found.group(0) for found in REMOTE_IN_SCRIPT.finditer(tag.get_text()))


def images_without_text(page: BeautifulSoup) -> Iterator[str]:
    """Images with no alternative text, or with a file name in its place."""
    for image in page.find_all("img"):
        source, alt = str(image.get("src", "")), str(image.get("alt", "")).strip()
        name = "data" if source.startswith("data:") else unquote(source)
        if not alt or alt == name or Path(name).name == Path(alt).name or FILE_NAME.match(alt):
            yield f"{name[:80]} (alt={alt!r})"


@lru_cache(maxsize=256)
def anchors(path: Path) -> frozenset[str]:
    """Everything on a page that a fragment can point to."""
    page = BeautifulSoup(path.read_bytes(), "html.parser")
    return frozenset(str(tag[key]) for key in ("id", "name") for tag in page.find_all(True) if tag.has_attr(key))


def broken_links(page: BeautifulSoup, path: Path, site: Path) -> Iterator[str]:
    """Links to pages, files and anchors of the same site that do not exist."""
    refreshes = [
        str(tag.get("content", "")).partition("url=")[2] for tag in page.find_all("meta", attrs={"http-equiv": re.compile("^refresh$", re.IGNORECASE)})
    ]
    local = [
        str(tag[key]) for name, key in (("a", "href"), ("link", "href"), ("script", "src"), ("img", "src")) for tag in page.find_all(name) if tag.has_attr(key)
    ]
    for address in [*local, *refreshes]:
        parts = urlsplit(address.strip())
        if parts.scheme or parts.netloc or address.strip() in ("", "#"):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
        if target.is_dir():
            target = target / "index.html"
        exists = target.is_file() and target.is_relative_to(site.resolve())
        if not exists or (parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in anchors(target)):
            yield address


def problems_of_page(path: Path, site: Path) -> list[str]:
    """What is wrong with one page, a line each."""
    page = BeautifulSoup(path.read_bytes(), "html.parser")
    name = path.relative_to(site)
    found = [f"{name}: loads {address} from another host" for address in remote_loads(page)]
    found += [f"{name}: image without a text that says what it shows: {image}" for image in images_without_text(page)]
    found += [f"{name}: broken link {address}" for address in broken_links(page, path, site)]
    html = page.find("html")
    if not isinstance(html, Tag) or not html.get("lang"):
        found.append(f"{name}: the page does not say its language")
    return list(dict.fromkeys(found))


def problems_of_site(site: Path) -> list[str]:
    """What is wrong with a rendered book, a line each; empty when all is well."""
    anchors.cache_clear()
    if not (site / "index.html").is_file():
        return [f"there is no {site / 'index.html'}"]
    found = [problem for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts for problem in problems_of_page(path, site)]
    for path in sorted(site.rglob("*.css")):
        found += [
            f"{path.relative_to(site)}: loads {address} from another host"
            for address in REMOTE_IN_CSS.findall(path.read_text(encoding="utf-8", errors="replace"))
        ]
    return found
