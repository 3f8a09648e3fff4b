"""Images as users have them: odd, huge, damaged, under any name."""
import io
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, PngImagePlugin
import pytest

from ttc_jax import errors, tasks
from ttc_jax.tasks import check as check_lib
from ttc_jax.tasks import images

pytestmark = pytest.mark.filterwarnings("error")


def noise(height, width, channels=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def write_task(folder, train=4, val=2, test=2):
  """A task of 8 noise images, as PNG."""
  (folder / "images").mkdir(parents=True)
  lists, start = {}, 0
  for part, count in (("train800", train), ("val200", val), ("test", test)):
    lists[part] = [f"images/{i}.png {i % 2}\n"
                   for i in range(start, start + count)]
    start += count
  lists["train800val200"] = lists["train800"] + lists["val200"]
  for part, lines in lists.items():
    (folder / f"{part}.txt").write_text("".join(lines))
  for i in range(start):
    Image.fromarray(noise(6, 7) // 2 + i).save(folder / "images" / f"{i}.png")
  return folder


def load(folder, **kw):
  kw = {"cache": str(folder.parent.parent / "cache")} | kw
  return tasks.load(folder.name, size=4, data=str(folder.parent), **kw)


# --- What Pillow may open -----------------------------------------------------

def test_a_format_that_runs_programs_is_not_opened(tmp_path, monkeypatch):
  (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
  (tmp_path / "gs").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  (tmp_path / "x.jpg").write_text(
      "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
      "showpage\n%%EOF\n")
  with pytest.raises(errors.DataError, match="x.jpg .*no image in a known"):
    images.read(str(tmp_path / "x.jpg"))
  assert not (tmp_path / "ran").exists()
  content = (tmp_path / "x.jpg").read_bytes()
  with pytest.raises(ValueError, match="no image"):
    images.decode(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO",
                                  "PNG", "PPM", "TIFF", "WEBP"])
def test_what_it_is_decides_not_what_it_is_called(tmp_path, kind):
  image, path = Image.fromarray(noise(20, 30)), tmp_path / "x.jpg"
  with open(path, "wb") as file:
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
  with Image.open(path) as opened:
    want = np.asarray(opened.convert("RGB"))
  assert (np.asarray(images.read(str(path))) == want).all()


# --- Memory -------------------------------------------------------------------

def big(mode, height, width):
  if mode == "I;16":
    return Image.fromarray(np.arange(
        height * width, dtype=np.uint32).astype(np.uint16).reshape(
            height, width))
  if mode == "P":
    image = Image.new("P", (width, height), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    image.info["transparency"] = b"\xff\x40"
    return image
  return Image.fromarray(noise(height, width, len(mode)), mode)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P"])
def test_tiles_give_the_pixels_of_the_whole(mode, monkeypatch):
  image = big(mode, 37, 11)
  whole = np.asarray(images.to_rgb(image))
  monkeypatch.setattr(images, "_TILE", 10)
  assert (np.asarray(images.to_rgb(image)) == whole).all()
  if mode == "RGBA":
    rgb, alpha = (np.asarray(image).astype(float)[..., a] for a in (
        slice(3), slice(3, 4)))
    want = rgb * alpha / 255 + 255 - alpha
    assert np.abs(whole - want).max() <= 1


_MEASURE = """
import resource, sys
from PIL import Image
from ttc_jax.tasks import images
warm = images.to_rgb(Image.new(sys.argv[1], (8, 8)))
image = Image.new(sys.argv[1], (6000, 4000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images.to_rgb(image)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "RGB"])
def test_memory_is_that_of_the_result(mode):
  """24 million pixels: 96 MB, as Pillow keeps RGB in 4 bytes, and a tile."""
  done = subprocess.run([sys.executable, "-c", _MEASURE, mode],
                        capture_output=True, text=True, check=True)
  assert int(done.stdout) < 4 * 24e6 + 60e6


# --- Around the pixels --------------------------------------------------------

def png_with_text(size, compressed):
  info = PngImagePlugin.PngInfo()
  info.add_text("prompt", "x" * size, zip=compressed)
  out = io.BytesIO()
  Image.fromarray(noise(5, 6)).save(out, "PNG", pnginfo=info)
  return out.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
def test_a_large_text_does_not_hide_whole_pixels(tmp_path, compressed,
                                                 monkeypatch):
  monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2 * 2**20)
  data = png_with_text(3 * 2**20, compressed)
  (tmp_path / "x.png").write_bytes(data)
  with pytest.raises(ValueError, match="MAX_TEXT"):
    with Image.open(tmp_path / "x.png") as image:
      image.load()
  assert (np.asarray(images.read(str(tmp_path / "x.png"))) == noise(5, 6)).all()
  small = images.without_text(data)
  assert len(small) < 1000 and b"prompt" not in small
  (tmp_path / "x.png").write_bytes(data[:-30])  # but they must be whole
  with pytest.raises(errors.DataError, match="x.png"):
    images.read(str(tmp_path / "x.png"))


def test_a_large_colour_profile_does_not_either(tmp_path):
  out = io.BytesIO()
  Image.fromarray(noise(5, 6)).save(out, "PNG")
  profile = b"p\0\0" + zlib.compress(bytes(3 * 2**20))
  chunk = (struct.pack(">I", len(profile)) + b"iCCP" + profile
           + struct.pack(">I", zlib.crc32(b"iCCP" + profile)))
  data = out.getvalue()
  (tmp_path / "x.png").write_bytes(data[:33] + chunk + data[33:])
  assert (np.asarray(images.read(str(tmp_path / "x.png"))) == noise(5, 6)).all()


def test_a_warning_names_the_file(tmp_path, caplog, recwarn):
  warnings.simplefilter("always")
  exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03"  # ends early
  for name in ("a.jpg", "b.jpg"):
    Image.fromarray(noise(5, 6)).save(tmp_path / name, exif=exif)
    images.read(str(tmp_path / name))
  text = [r.getMessage() for r in caplog.records]
  assert len(text) == 2 and all(r.levelno == logging.WARNING
                                for r in caplog.records)
  assert "a.jpg: Corrupt EXIF" in text[0] and "b.jpg: Corrupt EXIF" in text[1]
  assert not recwarn.list
  with pytest.warns(UserWarning, match="of others"):  # they go where they went
    warnings.warn("of others", stacklevel=1)


# --- Damage -------------------------------------------------------------------

def test_all_damaged_images_of_a_task_are_reported_at_once(tmp_path):
  folder = write_task(tmp_path / "data" / "toy")
  for i in (1, 4, 7):  # of train, val and test
    (folder / "images" / f"{i}.png").write_bytes(b"?")
  task = load(folder)
  with pytest.raises(errors.DataError) as error:
    task.split("train")
  text = str(error.value)
  assert text.startswith("cannot decode 3 images: ") and "\n" not in text
  assert all(text.count(f"/{i}.png (it is no image") == 1 for i in (1, 4, 7))
  with pytest.raises(errors.DataError) as again:
    task.split("train")
  assert again.value is error.value  # not read again
  assert not list((tmp_path / "cache").glob("*.npy*"))


def test_the_first_20_are_listed_and_all_are_counted(tmp_path):
  folder = write_task(tmp_path / "data" / "toy", train=30)
  for i in range(25):
    (folder / "images" / f"{i}.png").write_bytes(b"?")
  with pytest.raises(errors.DataError) as error:
    load(folder).split("val")  # of which none is damaged
    load(folder).split("trainval")
  assert str(error.value).startswith("cannot decode 25 images: ")
  assert str(error.value).count(".png (") == 20
  assert "; and 5 more: replace the files" in str(error.value)
  report = check_lib.check("toy", str(folder.parent))
  assert len(report["wrong"]) == 21
  assert report["wrong"][-1] == "train: 5 more examples cannot be read"


def test_one_damaged_image_is_a_sentence_of_its_own(tmp_path):
  folder = write_task(tmp_path / "data" / "toy")
  (folder / "images" / "5.png").write_bytes(b"?")
  with pytest.raises(errors.DataError, match=(
      r"^cannot decode image .*5.png \(it is no image.*\): replace the file, "
      "or leave it out$")):
    load(folder).split("trainval")
  assert load(folder).split("train").images.shape == (4, 4, 4, 3)


def test_check_reads_a_folder_once_and_reports(tmp_path, monkeypatch):
  folder = write_task(tmp_path / "data" / "toy")
  (folder / "test_new.txt").write_text("images/same.png 1\n")
  (folder / "images" / "same.png").write_bytes(
      (folder / "images" / "0.png").read_bytes())
  reads, read = [], images.read
  monkeypatch.setattr(images, "read", lambda p: reads.append(p) or read(p))
  report = check_lib.check("toy", str(folder.parent))
  assert len(reads) == 9 and report["wrong"] == []
  assert {p: s["count"] for p, s in report["splits"].items()} == {
      "train": 4, "val": 2, "trainval": 6, "test": 2, "new": 1}
  assert report["splits"]["train"]["labels"] == [2, 2]
  assert report["shared"] == {"pixels": 1}  # under another name
  assert "all well" in check_lib.text(report)
  (folder / "val200.txt").write_text("images/99.png 0\n")
  report = check_lib.check("toy", str(folder.parent))
  assert report["splits"] == {} and "val200.txt:1: " in report["wrong"][0]


# --- Names --------------------------------------------------------------------

@pytest.mark.parametrize("text, want", [
    ("Käfer 金魚 (ü)", "Käfer 金魚 (ü)"), ("a\x1b[31mb", "a\\x1b[31mb"),
    ("a\nb\tc\r", "a\\nb\\tc\\r"), ("\x7f\x85", "\\x7f\\x85"),
    ("pdf\u202egnp", "pdf\\u202egnp"), ("\u2066x\u2069", "\\u2066x\\u2069"),
    ("\u2028", "\\u2028"), ("bad \udcff", "bad \\udcff"),
    ("👩\u200d🔬", "👩\u200d🔬"), ("", "")])
def test_printable_escapes_what_acts_on_a_terminal(text, want):
  assert errors.printable(text) == want
  errors.printable(text).encode()  # can be printed


@pytest.mark.parametrize("name", ["x" * 240, "ü" * 120, "a b,c:d", "\x1b[2J",
                                  "--flag", "a\nb", "*[a]"])
def test_a_task_may_have_any_name(tmp_path, name):
  folder = write_task(tmp_path / "data" / name)
  assert load(folder).split("trainval").images.shape == (6, 4, 4, 3)
  report = check_lib.check(name, str(folder.parent))
  assert report["wrong"] == []
  text = check_lib.text(report)
  assert "\x1b" not in text and len(text.splitlines()) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="paths are bytes there")
def test_a_path_need_not_be_utf8(tmp_path, caplog):
  data = tmp_path / os.fsdecode(b"caf\xe9")
  folder = write_task(data / os.fsdecode(b"t\xff"))
  task = load(folder, cache=str(data / "cache"))
  assert task.split("val").images.shape == (2, 4, 4, 3)
  assert len(load(folder, cache_gib=0).split("val").digest) == 32
  check_lib.text(check_lib.check(folder.name, str(data))).encode()
  (folder / "images" / "0.png").write_bytes(b"?")
  with pytest.raises(errors.DataError) as error:
    load(folder).split("train")
  errors.printable(str(error.value)).encode()
  assert caplog.records and caplog.text.encode()


@pytest.mark.skipif(sys.platform != "linux", reason="paths are bytes there")
def test_a_list_is_utf8_whatever_the_locale(tmp_path):
  folder = write_task(tmp_path / "data" / "toy")
  (folder / "images" / "4.png").rename(folder / "images" / "Käfer 金魚.png")
  (folder / "val200.txt").write_text("images/Käfer 金魚.png 0\n",
                                     encoding="utf-8")
  (folder / "train800val200.txt").write_text("images/0.png 0\n")
  (folder / "classes.txt").write_text("Käfer\nзебра\n", encoding="utf-8")
  code = ("from ttc_jax import tasks; t = tasks.load('toy', size=4, "
          f"data={str(folder.parent)!r}, cache={str(tmp_path / 'c')!r}); "
          "print(t.digest, t.split('val').digest, ascii(t.classes))")
  done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True,
      env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0",
                        "PYTHONCOERCECLOCALE": "0"})
  assert done.returncode == 0, done.stderr
  want = load(folder)
  assert done.stdout.split()[:2] == [want.digest, want.split("val").digest]
  assert done.stdout.split(" ", 2)[2].strip() == ascii(want.classes)


@pytest.mark.parametrize("content, word", [
    ("images/0.png 0\nimages/ü.png 1\n".encode("latin-1"),
     "val200.txt:2: the byte 0xfc is not UTF-8: save"),
    ("images/4.png 0\n".encode("utf-16"), "val200.txt is UTF-16 text: save"),
    (b"path,label\nimages/4.png,0\n", "val200.txt:1: expected"),
    (b"images/4.png 0\nimages/99.png 0\nx\nimages/98.png 0\n",
     "val200.txt:2: there is no image file 'images/99.png' in"),
    (b"x\n" * 30, "; 29 more lines of this list are wrong: 2, 3, 4"),
    (b'"images/4.png" 0\n', "val200.txt:1: there is no image file"),
    (b"images\\4.png 0\n", "folders are separated by '/'"),
    (b"images/4.png 0.0\n", "whole number >= 0, not '0.0'")])
def test_lists_of_other_systems_are_a_sentence(tmp_path, content, word):
  folder = write_task(tmp_path / "data" / "toy")
  (folder / "val200.txt").write_bytes(content)
  with pytest.raises(errors.UserError) as error:
    load(folder)
  assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    b"images/4.png\t0\nimages/5.png\t1\n", b"images/4.png 0\rimages/5.png 1\r",
    b"./images/4.png 0\r\n./images//5.png 1", b"images/4.png 0\nimages/5.png 1",
    b"\xef\xbb\xbfimages/4.png  0 \nimages/5.png  1\n\n"])
def test_other_ends_of_lines_are_fine(tmp_path, content):
  folder = write_task(tmp_path / "data" / "toy")
  want = load(folder)
  (folder / "val200.txt").write_bytes(content)
  got = load(folder)
  assert got.split("val").digest == want.split("val").digest
  assert got.digest == want.digest


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (37, 37), (20, 31)])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_a_centre_crop_is_torchvision_s_resize_and_center_crop(shape, filter_):
  """Resize to the short side, then the middle, as two steps."""
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
  short, size = 32, 28
  w, h = picture.size
  scaled = picture.resize(
      (round(w * short / min(w, h)), round(h * short / min(w, h))),
      Image.Resampling[filter_.upper()])
  left, top = (round((side - size) / 2) for side in scaled.size)
  want = np.asarray(scaled.crop((left, top, left + size, top + size)))
  got = images.resize(picture, size, f"{filter_}/{short}")
  assert got.shape == (size, size, 3)
  assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("text", ["bicubic/", "bicubic/0", "bicubic/2x",
                                  "nearest/32", "/32", "bicubic/99999"])
def test_wrong_resamples_are_refused(text):
  with pytest.raises(errors.UserError, match="unknown resample"):
    images.resampling(text)


def test_a_short_side_below_the_crop_is_refused():
  with pytest.raises(errors.UserError, match="below the image size, 64"):
    images.make_decoder(64, "bicubic/32", None, 1.0)
