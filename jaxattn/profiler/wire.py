"""Protocol-buffer wire format, just enough to read what XLA serializes.

The messages are read by field number (numbers never change meaning in a published message), so neither
the protobuf package nor XLA's own message classes are needed.
"""


def _varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[i]
        i += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i
        shift += 7


def message(data: bytes) -> dict[int, list]:
    """Fields of one serialized message: field number -> every value, in order.

    Varints come as unsigned integers, everything else as bytes. Raises `ValueError` on a truncated message.
    """
    out: dict[int, list] = {}
    i, n = 0, len(data)
    try:
        while i < n:
            tag, i = _varint(data, i)
            kind = tag & 7
            if kind == 0:
                value, i = _varint(data, i)
            elif kind in (1, 2, 5):
                if kind == 2:
                    size, i = _varint(data, i)
                else:
                    size = 8 if kind == 1 else 4
                value = data[i : i + size]
                i += size
            else:
                raise ValueError(f"wire type {kind} at byte {i}: this is no protocol-buffer message")
            out.setdefault(tag >> 3, []).append(value)
    except IndexError:
        raise ValueError(f"the message ends inside a field ({n} bytes)") from None
    if i != n:
        raise ValueError(f"the message is {n} bytes long, its last field ends at byte {i}")
    return out


def integers(values: list) -> list[int]:
    """A repeated integer field, packed or not, as signed 64-bit integers."""
    out = []
    for value in values:
        if isinstance(value, bytes):
            i = 0
            while i < len(value):
                number, i = _varint(value, i)
                out.append(number)
        else:
            out.append(value)
    return [n - (1 << 64) if n >= 1 << 63 else n for n in out]


def integer(fields: dict[int, list], number: int, default: int = 0) -> int:
    """A singular integer field."""
    return integers(fields[number][-1:])[0] if number in fields else default


def text(fields: dict[int, list], number: int) -> str:
    """A singular string field, empty where absent."""
    return fields[number][-1].decode("utf-8", "replace") if number in fields else ""
