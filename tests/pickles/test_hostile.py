"""EDM-style pickles: nothing in them but weights has any effect, whatever their bytes say."""

import builtins
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError
from scm_sdk.export.cli import main
from scm_sdk.pickles import allowed, tensors
from scm_sdk.pickles.convert import convert_pickle
from scm_sdk.pickles.network import read_network


class Reduced:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(path, data, error=BundleError, match=""):
    path.write_bytes(data)
    with pytest.raises(error, match=match):
        read_network(path)


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Reduced(os.system, "touch owned"), r"(posix|nt)\.system"),
        (Reduced(eval, "open('owned', 'w')"), r"builtins\.eval"),
        (Reduced(exec, "open('owned', 'w')"), r"builtins\.exec"),
        (Reduced(getattr, Reduced(__import__, "os"), "system"), r"builtins\.getattr"),
        (Reduced(torch.load, "x"), r"torch\.serialization\.load"),
        (Reduced(np.load, "x", None, True), r"numpy\.load"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (builtins.open, r"_?io\.open"),  # `_io` since Python 3.13
    ],
)
def test_a_global_is_refused_by_its_name(edm_pickle, tmp_path, monkeypatch, payload, named):
    monkeypatch.chdir(tmp_path)
    edm_pickle(tmp_path / "net.pkl", change=lambda root: root.__setitem__("loss_fn", payload))
    with pytest.raises(BundleError, match=f"holds the global '{named}'"):
        convert_pickle("net.pkl", "out")
    assert {path.name for path in tmp_path.iterdir()} == {"net.pkl"}, "nothing ran and nothing was left"


def test_the_command_ends_with_6_and_says_what_it_found(tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(Reduced(os.system, "touch owned")))
    result = CliRunner().invoke(main, ["import", str(tmp_path / "net.pkl"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 6
    assert "system'" in result.stderr and "Traceback" not in result.stderr


HOSTILE = {
    # Text that becomes a name only on the stack, and names with dots that Python would walk.
    "stack_global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "the global 'os.system'"),
    "dotted": (b"\x80\x04\x8c\x0bcollections\x8c\x19OrderedDict.__reduce_ex__\x93.", "OrderedDict.__reduce_ex__"),
    "shifted": (b"\x80\x04\x8c\x0btorch_utils\x8c\x0epersistence.os\x93.", "torch_utils.persistence.os"),
    "global_not_text": (b"\x80\x04K\x01K\x02\x93.", "a global without a name"),
    "endless_name": (b"\x80\x02c" + b"a" * 9999, "a name without an end"),
    # Instructions that no network's file has.
    "protocol_0": (b"cos\nsystem\n(S'id'\ntR.", "the global 'os.system'"),
    "inst": (b"(S'id'\nios\nsystem\n.", "the instruction STRING"),
    "inst_alone": (b"(ios\nsystem\n.", "the instruction INST"),
    "obj": (b"\x80\x02(ccollections\nOrderedDict\no.", "the instruction OBJ"),
    "ext": (b"\x80\x02\x82\x01.", "the instruction EXT1"),
    "newobj_ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "the instruction NEWOBJ_EX"),
    "persid": (b"\x80\x02Pabc\n.", "the instruction PERSID"),
    "binpersid": (b"\x80\x02K\x01Q.", "a persistent id"),
    "long4": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "the instruction LONG4"),
    "next_buffer": (b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
    "unknown": (b"\x80\x02\xff.", "the instruction 0xff"),
    "protocol_9": (b"\x80\x09N.", "protocol 9"),
    # Allowed names used otherwise.
    "reduce_class": (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)R.", "a call of .*ModuleDict"),
    "new_function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "a new object of .*_rebuild_tensor_v2"),
    "ndarray": (b"\x80\x02cnumpy\nndarray\n)\x81.", "a new object of 'numpy.ndarray'"),
    "dict_call": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "made from something else"),
    "too_many": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "REDUCE cannot be carried out"),
    "not_callable": (b"\x80\x02K\x01)R.", "expected an allowed global and a tuple"),
    "object_dtype": (b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", "something other than numbers"),
    # States.
    "build_dict": (b"\x80\x02}}b.", "a state for an object of type dict"),
    "build_global": (b"\x80\x02ccollections\nOrderedDict\n}b.", "a state for an object of type Known"),
    "build_twice": (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81}b}b.", "or that has two"),
    "build_slots": (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b.", "whose state is no dict"),
    "setitem_on_object": (b"\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81K\x01K\x02s.", "expected a dict"),
    "append_on_dict": (b"\x80\x02}K\x01a.", "expected a list"),
    "key_of_numbers": (b"\x80\x02}K\x01K\x02s.", "a key of type int"),
    "unhashable": (b"\x80\x02}]K\x02s.", "a key of type list"),
    # Stack and memo.
    "empty_stack": (b"\x80\x02R.", "REDUCE cannot be carried out"),
    "no_mark": (b"\x80\x02t.", "TUPLE cannot be carried out"),
    "no_memo": (b"\x80\x02h\x05.", "BINGET cannot be carried out"),
    "two_left": (b"\x80\x02NN.", "does not hold one object"),
    "open_mark": (b"\x80\x02(N.", "does not hold one object"),
    "bad_text": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "UnicodeDecodeError"),
    "trailing": (b"\x80\x02N.garbage", "continues for 7 bytes"),
    "no_network": (b"\x80\x02}.", "holds no network 'ema', expected one of: none is there"),
    "just_none": (b"\x80\x02N.", "holds no network 'ema'"),
    "zip": (b"PK\x03\x04....", "as torch.save writes it"),
    "text": (b"hello, I am no pickle at all", "no network's pickle|the instruction"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes(tmp_path, case):
    data, match = HOSTILE[case]
    before = set(sys.modules)
    refused(tmp_path / "net.pkl", data, ScmError, match)
    assert set(sys.modules) == before, "nothing was imported"


@pytest.mark.parametrize(
    "claim", [b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"X\xff\xff\xff\x00", b"r\xff\xff\xff\xff"]
)
def test_huge_claims_allocate_nothing(tmp_path, claim):
    """Bytes, text and a memo slot far beyond the file: Python's own unpickler reserves room for some of these."""
    (tmp_path / "net.pkl").write_bytes(b"\x80\x04N" + claim + b".")
    tracemalloc.start()
    try:
        with pytest.raises(ScmError):
            read_network(tmp_path / "net.pkl")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_long_text_is_refused(tmp_path):
    refused(
        tmp_path / "net.pkl", b"\x80\x04X" + struct.pack("<I", (16 << 20) + 1) + b"a" * ((16 << 20) + 1) + b".",
        IntegrityError, "a string of 16777217 bytes",
    )  # fmt: skip


def test_endless_work_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(allowed, "MAX_STEPS", 1000)
    monkeypatch.setattr(allowed.Budget, "__init__", lambda self: setattr(self, "steps", 1000))
    refused(tmp_path / "net.pkl", b"\x80\x04" + b"N0" * 1000 + b"N.", BundleError, "more than 1000 instructions")


def test_deep_nests_end_without_a_crash(tmp_path):
    refused(tmp_path / "lists.pkl", b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", ConfigError, "no network")
    refused(tmp_path / "tuples.pkl", b"\x80\x04N" + b"\x85" * 100_000 + b".", ConfigError, "no network")


def _module(state: bytes, name: bytes = b"N") -> bytes:
    """Code of a persistent object whose state is ``state``'s items."""
    return (
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(\x8c\x04type\x8c\x05class\x8c\x0aclass_name\x8c"
        + bytes([len(name)]) + name + b"\x8c\x05state}(" + state + b"uu\x85R"
    )  # fmt: skip


EMPTY = b"\x8c\x0b_parameters}\x8c\x08_buffers}"


def test_a_tower_of_shared_modules_is_refused(tmp_path):
    """Forty modules, each of which names the one below twice, are 2**40 modules to who walks them."""
    code = _module(EMPTY + b"\x8c\x08_modules}") + b"q\x000"
    for level in range(40):
        twice = b"\x8c\x08_modules}(\x8c\x01ah" + bytes([level]) + b"\x8c\x01bh" + bytes([level]) + b"u"
        code += _module(EMPTY + twice) + b"q" + bytes([level + 1]) + b"0"
    refused(tmp_path / "net.pkl", b"\x80\x04" + code + b"h\x28.", BundleError, "more than 500000 names or nests deeper")


def test_facts_that_multiply_are_cut_short(edm_pickle, tmp_path):
    def multiply(root):
        value = ["lol"] * 10
        for _ in range(30):
            value = [value] * 10
        root["dataset_kwargs"] = {"laughs": value}

    edm_pickle(tmp_path / "net.pkl", change=multiply)
    assert len(json.dumps(read_network(tmp_path / "net.pkl").facts)) < 200_000


def test_tensors_that_multiply_are_refused(edm_pickle, tmp_path):
    """A stride of 0 makes a gigabyte out of one stored number."""

    def expand(root):
        root["ema"].unet.out_gain.data = torch.zeros(1).expand(1 << 28)

    edm_pickle(tmp_path / "net.pkl", change=expand)
    with pytest.raises(BundleError, match=r"would unfold to 10737\d+ bytes of tensors"):
        read_network(tmp_path / "net.pkl")


@pytest.mark.parametrize("shape", [(2**40, 2**40, 0), (0, *[2**47] * 15), (2**48, 0)])
def test_no_tensor_has_sizes_that_no_array_has(shape):
    """An empty one could; numpy and torch refuse it in words of their own when it is read."""
    storage = tensors.Storage("float32", 4, memoryview(b""))
    with pytest.raises(ValueError, match="a shape"):
        tensors.rebuild_tensor(storage, 0, shape, (1,) * len(shape))
    with pytest.raises(ValueError, match="a shape"):
        array = tensors.StoredArray()
        array.build((1, shape, tensors.StoredDtype("f4"), False, memoryview(b"")))
    assert tensors.rebuild_tensor(storage, 0, (2**20, 0), (1, 1)).numpy().shape == (2**20, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("", 1), ("a.b", 1), ("a\nb", 1), ("x" * 2000, 1)],
    ids=["empty", "dotted", "line", "long"],
)
def test_names_that_could_be_mistaken_are_refused(edm_pickle, tmp_path, name, value):
    def rename(root):
        parameters = root["ema"].unet._parameters
        parameters[name] = parameters.pop("out_gain")

    edm_pickle(tmp_path / "net.pkl", change=rename)
    with pytest.raises(IntegrityError, match="has no proper name"):
        read_network(tmp_path / "net.pkl")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x18.", "torch did not write"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
        (b"ctorch\nHalfStorage\n", b"cposix\nsystem\n     ", r"posix\.system"),
        (b"ctorch\nHalfStorage\n", b"ctorch\nLongStorage\n", "a storage of .* bytes, expected"),
    ],
)
def test_a_storage_is_read_as_strictly(pkl, old, new, match):
    data = pkl.read_bytes()
    assert old in data
    refused(pkl, data.replace(old, new), ScmError, match)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(pkl, tmp_path, share):
    data = pkl.read_bytes()
    refused(tmp_path / "short.pkl", data[: int(len(data) * share)], IntegrityError, "truncated|cannot be carried out")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_raises_our_errors_or_reads(pkl, edits):
    data = bytearray(pkl.read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    damaged = pkl.with_name("damaged.pkl")
    damaged.write_bytes(data)
    try:
        for tensor in read_network(damaged).tensors.values():
            tensor.numpy()
    except ScmError as exc:
        assert len(str(exc)) < 3000


@given(st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_raise_our_errors(tmp_path, data):
    path = tmp_path / "random.pkl"
    path.write_bytes(b"\x80\x04" + data)
    with pytest.raises(ScmError):
        read_network(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    with pytest.raises(BundleError, match="is no file"):
        read_network(tmp_path)
    with pytest.raises(BundleError, match="is no file"):
        read_network(tmp_path / "absent.pkl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="is no file"):
        read_network(tmp_path / "pipe")


def test_the_reader_needs_no_torch():
    code = "import sys, scm_sdk.pickles.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_that_is_no_import_is_not_replaced(pkl, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match=r"holds no config\.json, so it is not replaced"):
        convert_pickle(pkl, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text("utf-8") == "mine"
