"""What is refused before a byte of memory is taken for it."""

import io
import pickle
import struct
import zipfile

import pytest
import torch

from lm import archive
from lm.archive import DamagedError, Stored, SuspectError

PAYLOAD = {
    "a": torch.arange(12).view(3, 4),
    "b": [1.5, "text", (None, True)],
    "c": torch.zeros((), dtype=torch.bfloat16),
}


def saved(payload=PAYLOAD):
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer


def rebuilt(change, compression=zipfile.ZIP_STORED):
    """The archive of PAYLOAD with its members changed, {name: bytes}, written by another program."""
    with zipfile.ZipFile(saved()) as found:
        members = change({info.filename: found.read(info) for info in found.infolist()})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, allowZip64=True) as made:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with made.open(info, "w", force_zip64=True) as member:
                member.write(content)
    return with_long_directory(buffer)


def with_long_directory(buffer):
    """Puts the zip64 records, which torch.save always writes, before the end record."""
    content = buffer.getvalue()
    end = len(content) - 22
    count, size, offset = struct.unpack("<HLL", content[end + 10 : end + 20])
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    return io.BytesIO(content[:end] + record + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + content[end:])


def pickled(data):
    return lambda members: {**members, "archive/data.pkl": data}


def test_what_is_inside_is_told_without_a_tensor():
    assert archive.examine(saved()) == {
        "a": Stored(torch.int64, (3, 4)),
        "b": [1.5, "text", (None, True)],
        "c": Stored(torch.bfloat16, ()),
    }
    assert Stored(torch.int64, (3, 4)).nbytes == 96
    model = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 1, 3))[0].sum().backward()
    optimizer.step()
    found = archive.examine(saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    assert found["model"]["weight_ih_l0"] == Stored(torch.float32, (16, 3))
    assert found["optimizer"]["state"][0]["exp_avg"].shape == (16, 3)
    assert archive.examine(rebuilt(dict)) == archive.examine(
        saved()
    )  # so the faults below are found, not the rebuilding


def test_a_seal_is_read_by_torch_and_by_us():
    content = archive.seal(saved())
    assert archive.is_intact(io.BytesIO(content)) is True
    assert archive.is_intact(io.BytesIO(content[:-1] + b"g")) is False
    assert archive.is_intact(io.BytesIO(b"PK" + content[2:].replace(b"text", b"TEXT"))) is False
    assert archive.is_intact(saved()) is None
    assert archive.is_intact(io.BytesIO()) is None
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True)["a"], PAYLOAD["a"])
    assert archive.examine(io.BytesIO(content)) == archive.examine(saved())


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.9, -1])
def test_a_file_cut_short(keep):
    content = saved().getvalue()
    with pytest.raises(DamagedError):
        archive.examine(io.BytesIO(content[: int(keep * len(content)) if isinstance(keep, float) else keep]))


def test_compressed_members():
    with pytest.raises(SuspectError, match="compressed members"):
        archive.examine(rebuilt(lambda members: {**members, "archive/data/9": bytes(10**6)}, zipfile.ZIP_DEFLATED))


def test_members_that_share_their_bytes():
    """Every entry of the directory points to one member: each would be given memory of its own."""
    large = {f"archive/data/{i}": bytes(1000 if i == 1 else 1) for i in range(1, 9)}
    content = bytearray(rebuilt(lambda members: {**members, **large}).getvalue())
    entries = [content.rindex(f"archive/data/{i}".encode()) - 46 for i in range(1, 9)]
    for entry in entries[1:]:
        for field in (slice(20, 28), slice(42, 46)):  # sizes; place of the member
            content[entry + field.start : entry + field.stop] = content[
                entries[0] + field.start : entries[0] + field.stop
            ]
    with pytest.raises(SuspectError, match=r"its members declare 8,\d\d\d bytes in a file of"):
        archive.examine(io.BytesIO(content))


def test_sizes_beyond_the_file():
    content = bytearray(rebuilt(dict).getvalue())
    for signature, at in ((b"PK\1\2", 20),):
        place = content.rindex(signature)
        content[place + at : place + at + 8] = struct.pack("<LL", 2**31, 2**31)
    with pytest.raises(SuspectError, match=r"its members declare 2,147,\d\d\d,\d\d\d bytes in a file of"):
        archive.examine(io.BytesIO(content))


def test_a_directory_that_another_reader_would_not_find():
    content = rebuilt(dict).getvalue()
    with pytest.raises(DamagedError, match="directory is not where"):
        archive.examine(io.BytesIO(b"prefix" + content))
    plain = content[:-98] + content[-22:]
    with pytest.raises(DamagedError, match="directory is not where"):
        archive.examine(io.BytesIO(plain))


@pytest.mark.parametrize(
    "name", ["archive/constants.pkl", "archive/code/a.py", "archive/DATA.PKL", "other/data/0", "x"]
)
def test_members_that_torch_does_not_write(name):
    with pytest.raises(SuspectError, match="other members"):
        archive.examine(rebuilt(lambda members: {**members, name: b""}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name():
    content = rebuilt(lambda members: {**members, "archive/data/8": b"1", "archive/data/9": b"2"}).getvalue()
    with pytest.raises(SuspectError, match="other members"):
        archive.examine(io.BytesIO(content.replace(b"archive/data/9", b"archive/data/8")))


def call(name, *arguments):
    class Call:
        def __reduce__(self):
            return name, arguments

    return pickle.dumps(Call(), 2)


@pytest.mark.parametrize("name", [eval, bytearray, set, torch.zeros, torch.Size, torch.nn.Parameter])
def test_other_names_are_refused(name):
    with pytest.raises(SuspectError, match=r"it asks for |persistent"):
        archive.examine(rebuilt(pickled(call(name, (9,)))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"N.", None),
        (b"N", "pickle exhausted"),
        (b"", "pickle exhausted"),
        (b"r\xff\xff\xff\x7fN.", "declares more values|underflow"),
        (b"Nr\xff\xff\xff\x7f.", "declares more values"),
        (b"Np999999999999\n.", "declares more values"),
        (b"\x8e" + struct.pack("<Q", 2**60) + b"x.", "expected"),
        (b"]q\0h\0a.", "each other over and over|deep"),
        (b"(((.", "unexpected MARK|underflow"),
        (b"\xff", "unknown"),
        (b"X\x01\0\0\0aQ.", "not enough values"),
    ],
)
def test_pickles_of_no_good(data, message):
    if message is None:
        assert archive.examine(rebuilt(pickled(data))) is None
        return
    with pytest.raises(SuspectError, match=message):
        archive.examine(rebuilt(pickled(data)))


def test_containers_that_expand():
    laughs = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(SuspectError, match="each other over and over"):
        archive.examine(saved(laughs))
    deep = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(SuspectError, match="deep"):
        archive.examine(saved(deep))


def declared(old, new):
    def change(members):
        data = members["archive/data.pkl"]
        assert data.count(old) >= 1
        return {**members, "archive/data.pkl": data.replace(old, new)}

    return change


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x0ctq", b"J\x00\x00\x00\x7ftq", "storage 0 declares 2,130,706,432 values and has another size"),
        (b"K\x03K\x04\x86", b"M\xff\xffK\x04\x86", r"shape \[65535, 4\] over 12 values"),
        (b"K\x03K\x04\x86", b"J\xff\xff\xff\xffK\x04\x86", "negative size"),
        (b"K\x04K\x01\x86", b"K\x00K\x00\x86", None),
        (b"K\x04K\x01\x86", b"K\x09K\x01\x86", r"shape \[3, 4\] over 12 values"),
        (b"K\x04K\x01\x86", b"K\x04K\x01K\x01\x87", "zip"),
    ],
)
def test_tensors_beyond_their_storage(old, new, message):
    file = rebuilt(declared(old, new))
    if message is None:  # three equal rows of one value: no larger than the storage
        assert archive.examine(file)["a"].shape == (3, 4)
        return
    with pytest.raises(SuspectError, match=message):
        archive.examine(file)


def test_a_tensor_changed_after_it_is_made():
    with zipfile.ZipFile(saved()) as found:
        data = found.read("archive/data.pkl")
    made = data.rindex(b"Rq") + 1  # just after the last tensor is built
    with pytest.raises(SuspectError, match="changes a tensor"):
        archive.examine(rebuilt(pickled(data[:made] + b"}K\x01K\x02sb" + data[made:])))
