"""The storage behind Xet, on the small Hub: blocks of chunks (xorbs), lists of files (shards), files put together.

After huggingface.co/docs/xet: `api` (routes), `shard` and `xorb` (formats), `download-protocol`. The server stores
what the Xet client sends and reads no more of it than where chunks begin. Import it beside `minihub` for its routes.
"""

import struct
from pathlib import Path
from typing import Any

from minihub import Handler, Refusal, route

HEADER = ENTRY = 48  # bytes of a shard's header, and of each of its entries
VERIFIED, WITH_SHA256 = 0x80000000, 0x40000000


def name(raw: bytes) -> str:
    """A hash as the API writes it: eight bytes at a time, from the last to the first."""
    return b"".join(raw[i : i + 8][::-1] for i in range(0, 32, 8)).hex()


def files_of(shard: bytes) -> dict[str, dict[str, Any]]:
    """SHA-256 -> name, size and terms (which chunks of which xorb) of every file that a shard lists."""
    found, at = {}, HEADER
    while shard[at : at + 32] != b"\xff" * 32:
        file, (flags, count) = name(shard[at : at + 32]), struct.unpack_from("<II", shard, at + 32)
        terms = []
        for entry in range(at + ENTRY, at + ENTRY * (1 + count), ENTRY):
            _, size, start, end = struct.unpack_from("<IIII", shard, entry + 32)
            xorb = name(shard[entry : entry + 32])
            terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": start, "end": end}})
        at += ENTRY * (1 + count * (2 if flags & VERIFIED else 1))
        if not flags & WITH_SHA256:
            raise Refusal(400, "", "a file without its SHA-256")
        size = sum(term["unpacked_length"] for term in terms)
        found[name(shard[at : at + 32])] = {"name": file, "size": size, "terms": terms}
        at += ENTRY
    return found


def chunk_starts(xorb: bytes) -> list[int]:
    """Where each chunk begins in a xorb, and where the last one ends; a header has version, sizes and compression."""
    starts, at = [0], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        starts.append(at)
    return starts


def stored(h: Handler, xorb: str) -> Path:
    return h.server.root / f"xorb-{xorb}"


@route("GET", r"/cas/v1/chunks/[^/]+/([0-9a-f]{64})")
def chunk(h: Handler, chunk: str) -> None:
    raise Refusal(404, "", "no file of another repository has this chunk")


@route("POST", r"/cas/v1/xorbs/default/([0-9a-f]{64})")
def put_xorb(h: Handler, xorb: str) -> None:
    is_new = not stored(h, xorb).exists()
    stored(h, xorb).write_bytes(h.raw)
    h.reply({"was_inserted": is_new})


@route("POST", r"/cas/v1/shards")
def put_shard(h: Handler) -> None:
    files = files_of(h.raw)
    if missing := {t["hash"] for file in files.values() for t in file["terms"] if not stored(h, t["hash"]).exists()}:
        raise Refusal(400, "", f"the shard names xorbs that were not uploaded: {sorted(missing)}")
    h.server.xet_files |= files
    h.reply({"result": 1})


@route("GET", r"/cas/v1/reconstructions/([0-9a-f]{64})")
def reconstruction(h: Handler, file: str) -> None:
    terms = next((known["terms"] for known in h.server.xet_files.values() if known["name"] == file), None)
    if terms is None:
        raise Refusal(404, "", "no such file")
    if h.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0] != "0":
        raise Refusal(416, "", "files are given whole")
    fetch: dict[str, list] = {}
    for term in terms:
        starts = chunk_starts(stored(h, term["hash"]).read_bytes())
        first, last = starts[term["range"]["start"]], starts[term["range"]["end"]] - 1
        url = f"{h.server.url}/cas/data/{term['hash']}"
        fetch.setdefault(term["hash"], []).append(
            {"range": term["range"], "url": url, "url_range": {"start": first, "end": last}}
        )
    h.reply({"offset_into_first_range": 0, "terms": terms, "fetch_info": fetch})


@route("GET", r"/cas/data/([0-9a-f]{64})")
def data(h: Handler, xorb: str) -> None:
    whole = stored(h, xorb).read_bytes()
    first, last = map(int, h.headers["Range"].removeprefix("bytes=").split("-"))
    part = whole[first : last + 1]
    h.reply(part, 206, {"Content-Range": f"bytes {first}-{last}/{len(whole)}"})
