from __future__ import annotations

from kvmlite._native import ffi, lib


def test_every_fault_code_has_a_text_of_its_own() -> None:
    codes = [code for name, code in ffi.typeof("enum kvl_error").relements.items() if name != "KVL_OK"]
    texts = {ffi.string(lib.kvl_error_text(code)).decode() for code in codes}
    assert len(codes) == len(texts) >= 18
    assert "unknown error" not in texts


def test_other_numbers_have_no_fault_text() -> None:
    assert ffi.string(lib.kvl_error_text(0)) == b"unknown error"
    assert ffi.string(lib.kvl_error_text(-1000)) == b"unknown error"


def make_iov(*parts: bytes) -> tuple[object, list[object]]:
    buffers = [ffi.new("uint8_t[]", part) for part in parts]
    iov = ffi.new("struct iovec[]", [{"iov_base": b, "iov_len": len(p)} for b, p in zip(buffers, parts, strict=True)])
    return iov, buffers


def test_iov_read_crosses_entries_from_any_offset() -> None:
    iov, _keep = make_iov(b"abc", b"de", b"fghi")
    flat = ffi.new("uint8_t[16]")
    for offset in range(10):
        for size in range(10):
            expected = b"abcdefghi"[offset : offset + size]
            assert lib.kvl_iov_read(iov, 3, offset, flat, size) == len(expected)
            assert bytes(ffi.buffer(flat, len(expected))) == expected


def test_iov_write_stops_at_the_end() -> None:
    iov, (first, second) = make_iov(b"...", b"..")
    assert lib.kvl_iov_write(iov, 2, 2, b"XYZ!", 4) == 3
    assert (bytes(ffi.buffer(first, 3)), bytes(ffi.buffer(second, 2))) == (b"..X", b"YZ")
    assert lib.kvl_iov_write(iov, 2, 5, b"?", 1) == 0
