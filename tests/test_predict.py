"""Characters on pictures: read, scanned, framed as the data sets do, and answered by a checkpoint."""

import io
import json
import os

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from kernels import plain
from mlp import InputError, checkpoint, configs, data, framing, glyphs, inference, ink, pictures
from mlp.__main__ import main
from mlp.loop import fit
from mlp.model import MLP
from mlp.scratch import ScratchLearner

from .training import ROOT, cpu

MNIST = ROOT.parent / "shared" / "data" / "mnist-t10k"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"the MNIST test images are not in {MNIST}")


def font(size, name="DejaVuSans"):
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def drawn(
    character, size=150, canvas=(240, 260), at=None, paper="white", colour="black", mode="RGB", name="DejaVuSans"
):
    image = Image.new(mode, canvas, paper)
    ImageDraw.Draw(image).text(
        at or (canvas[0] // 2, canvas[1] // 2), character, fill=colour, font=font(size, name), anchor="mm"
    )
    return image


def pixels(image):
    return np.asarray(image.convert("RGB"), np.float32) / 255


def scanned(character, **how):
    return ink.scan(pixels(drawn(character, **how)))


def agreement(scan, other):
    """The share of the ink of each of two scans, laid over each other at their middles, that is at most a pixel away
    from ink of the other; the smaller of the two shares."""
    side = max(*scan.shape, *other.shape)
    one, two = (np.pad(s, [((side - n) // 2, side - n - (side - n) // 2) for n in s.shape]) for s in (scan, other))
    return min((a & binary_dilation(b, np.ones((3, 3)))).sum() / a.sum() for a, b in ((one, two), (two, one)))


def photographed(ink_in_01, rng, paper=(0.9, 0.88, 0.8), colour=(0.15, 0.1, 0.4), noise=0.05, shade=0.5, quality=60):
    """float32 (H, W, 3): `ink` (H, W) on paper that is lit from one side, with the noise of a sensor and of JPEG."""
    H, W = ink_in_01.shape
    paper, colour = np.array(paper), np.array(colour)
    y, x = np.mgrid[:H, :W] / max(H, W)
    picture = (paper + (colour - paper) * ink_in_01[..., None]) * (1 - shade * (0.6 * x + 0.4 * y))[..., None]
    picture += rng.normal(0, noise, picture.shape)
    file = io.BytesIO()
    Image.fromarray(np.round(255 * picture.clip(0, 1)).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return pictures.read(file)


# ---- pictures


@pytest.mark.parametrize("suffix, mode", [
    ("png", "RGB"), ("png", "RGBA"), ("png", "L"), ("png", "LA"), ("png", "1"), ("png", "P"), ("png", "I;16"),
    ("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("bmp", "RGB"), ("gif", "P"), ("webp", "RGB"), ("tiff", "F"),
    ("tiff", "I;16"), ("tiff", "CMYK"), ("ppm", "RGB"),
])  # fmt: skip
def test_every_format_and_mode_is_read_alike(tmp_path, suffix, mode):
    image, path = drawn("R"), tmp_path / f"r.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path)
    picture = pictures.read(path)
    assert picture.shape == (260, 240, 3) and picture.dtype == np.float32
    assert picture.min() >= 0 and picture.max() <= 1
    assert agreement(ink.scan(picture), scanned("R")) > 0.97


def test_exif_orientation_is_followed(tmp_path):
    upright = drawn("F")
    turned = {
        1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
        6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270,
    }  # fmt: skip
    for orientation, method in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if method is None else upright.transpose(method)
        stored.save(tmp_path / "f.png", exif=exif)
        assert np.array_equal(pictures.read(tmp_path / "f.png"), pixels(upright)), orientation


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_a_transparent_background_is_paper_for_any_ink(tmp_path, colour):
    drawn("2", mode="RGBA", paper=(0, 0, 0, 0), colour=colour).save(tmp_path / "two.png")
    assert agreement(ink.scan(pictures.read(tmp_path / "two.png")), scanned("2")) > 0.97


def test_transparent_corners_are_filled_with_the_paper(tmp_path):
    image = drawn("2", mode="RGBA", paper="white")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 239, 259), 40, fill=255)
    image.putalpha(mask)
    image.save(tmp_path / "two.png")
    assert pictures.read(tmp_path / "two.png")[0, 0].tolist() == [1, 1, 1]
    assert agreement(ink.scan(pictures.read(tmp_path / "two.png")), scanned("2")) > 0.97


def test_a_large_picture_is_reduced_and_a_small_one_is_not(tmp_path):
    drawn("5", 1500, (3000, 2400)).save(tmp_path / "large.jpg")
    picture = pictures.read(tmp_path / "large.jpg")
    assert max(picture.shape) == pictures.LARGEST and picture.shape[:2] == (800, 1000)
    assert agreement(ink.scan(picture), scanned("5")) > 0.97
    drawn("5", 20, (28, 28)).save(tmp_path / "small.png")
    assert pictures.read(tmp_path / "small.png").shape == (28, 28, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_a_file_cut_off_or_altered_is_one_sentence_or_a_picture(tmp_path, suffix):
    path, refused = tmp_path / f"cut.{suffix}", 0
    drawn("5", 60, (80, 80)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(3)
    cut = [whole[:length] for length in np.linspace(0, len(whole) - 1, 25).astype(int)]
    for content in [*cut, *(_altered(whole, place) for place in rng.integers(0, len(whole), 40))]:
        path.write_bytes(content)
        try:
            assert pictures.read(path).ndim == 3
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused >= 10


def _altered(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


# ---- ink


@pytest.mark.parametrize("paper, colour", [
    ("black", "white"), ("#102040", "#f0d020"), ("#f0d020", "#102040"), ("red", "lime"), ("#808080", "#606060"),
    ("#d0d0ff", "#ffd0d0"), ("blue", "black"),
])  # fmt: skip
@pytest.mark.parametrize("character", ["8", "L", "g"])
def test_colours_and_polarity_do_not_matter(paper, colour, character):
    assert agreement(scanned(character, paper=paper, colour=colour), scanned(character)) > 0.97


@pytest.mark.parametrize("size", [24, 60, 150, 400])
def test_neither_the_size_nor_the_place_matters(size):
    small = scanned("G", size=size, canvas=(900, 700), at=(620, 260))
    assert agreement(small, scanned("G", size=400, canvas=(600, 600))) > 0.97
    assert abs(max(small.shape) - ink.SCAN) <= 1


@pytest.mark.parametrize("paper, colour", [((0.9, 0.88, 0.8), (0.15, 0.1, 0.4)), ((0.1, 0.25, 0.15), (0.9, 0.9, 0.8))])
@pytest.mark.parametrize("noise, shade", [(0.0, 0.7), (0.1, 0.0), (0.06, 0.5)])
def test_uneven_light_and_noise_are_removed(paper, colour, noise, shade):
    clean = pixels(drawn("k"))[..., 0]
    picture = photographed(1 - clean, np.random.default_rng(0), paper, colour, noise, shade)
    assert agreement(ink.scan(picture), scanned("k")) > 0.97


def test_dots_are_kept_and_dirt_is_not():
    image = drawn("i")
    plain_scan = ink.scan(pixels(image))
    assert plain_scan.shape[0] == ink.SCAN and not plain_scan.any(axis=1).all()  # the gap below the dot
    draw = ImageDraw.Draw(image)
    for x, y in ((20, 30), (200, 40), (60, 220), (215, 230)):
        draw.ellipse((x, y, x + 4, y + 4), fill="black")
    draw.polygon([(0, 259), (0, 190), (40, 259)], fill="black")  # the table below the sheet
    assert agreement(ink.scan(pixels(image)), plain_scan) > 0.97


@pytest.mark.parametrize("character", ["6", "O", "S", "4", "A", "X"])
def test_a_character_without_a_margin(character):
    image = drawn(character)
    tight = image.crop(Image.eval(image.convert("L"), lambda value: 255 - value).getbbox())
    assert agreement(ink.scan(pixels(tight)), scanned(character)) > 0.97


def test_fine_strokes_become_those_of_a_pen():
    fine = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(fine).line([(80, 60), (80, 340), (300, 340)], fill="black", width=3)
    distance = ink.signed_distance(np.pad(ink.scan(pixels(fine)), 4))
    assert 0.9 * ink.HALF_STROKE <= distance.max() / ink.SCAN <= 1.4 * ink.HALF_STROKE
    bold = scanned("L", name="DejaVuSans-Bold")
    assert max(bold.shape) == ink.SCAN  # which were thick enough


def ramp():
    return np.broadcast_to(np.linspace(0.2, 0.9, 200)[:, None, None], (200, 200, 3)).astype(np.float32)


@pytest.mark.parametrize("picture", [
    np.ones((50, 50, 3), np.float32),
    np.zeros((1, 1, 3), np.float32),
    ramp(),
    photographed(np.zeros((200, 200)), np.random.default_rng(1), noise=0.1),
    photographed(np.zeros((300, 200)), np.random.default_rng(2), noise=0.0, quality=5),
    np.random.default_rng(3).random((28, 28, 3), np.float32),
], ids=["white", "a pixel", "ramp", "noise", "jpeg", "strong noise"])  # fmt: skip
def test_a_blank_picture_is_refused(picture):
    with pytest.raises(InputError, match="^here is blank, expected a character .*; give another$"):
        ink.scan(picture, "here")


# ---- frames


def box(image):
    rows, columns = np.flatnonzero((image > 127).any(axis=1)), np.flatnonzero((image > 127).any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize("character", ["1", "W", "J", "g", "-"])
def test_frames_are_as_described(character):
    scan = scanned(character)
    for kind, longer in (("mnist", (19, 20)), ("emnist", (23, 26)), ("glyphs", (19, 21))):
        image = framing.frame(scan, kind)
        assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() > 200
        top, bottom, left, right = box(image)
        assert longer[0] <= max(bottom - top, right - left) <= longer[1], kind
        if kind == "mnist":
            mass = [float(image.sum(axis=axis) @ np.arange(28) / image.sum()) for axis in (1, 0)]
            assert all(13.4 <= place <= 14.6 for place in mass)
        else:
            assert abs(top + bottom - 28) <= 1 and abs(left + right - 28) <= 1, kind
    emnist = framing.frame(scan, "emnist")
    assert not emnist[[0, -1]].any() and not emnist[:, [0, -1]].any() and emnist.max() == 255


def test_the_frame_is_that_of_the_data_set():
    digits = tuple("0123456789")
    for name, classes, kind in (
        ("mnist-t10k", digits, "mnist"), ("emnist-bymerge", glyphs.CLASSES, "emnist"), ("EMNIST", digits, "emnist"),
        ("glyphs-1000", glyphs.CLASSES, "glyphs"), ("raw", glyphs.CLASSES, "emnist"), ("", digits, "mnist"),
    ):  # fmt: skip
        assert framing.choose(name, tuple(classes)) == kind


@needs_mnist
def test_mnist_itself_comes_back():
    images = data.load(MNIST).images[:100]
    again = [framing.frame(ink.scan(np.repeat(i.reshape(28, 28, 1), 3, 2) / np.float32(255)), "mnist") for i in images]
    original, again = images / 255, np.reshape(again, (100, 784)) / 255
    distance = np.abs(original - again).mean()
    moved = np.abs(original - np.roll(original, 1, axis=1)).mean()  # by one pixel
    assert distance < 0.6 * moved


# ---- the forward pass


def arrays_of(sizes, rng, norm=()):
    arrays = {}
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        arrays[f"weight{i}"] = rng.normal(0, (2 / n_in) ** 0.5, (n_in, n_out)).astype(np.float32)
        arrays[f"bias{i}"] = rng.normal(0, 0.1, n_out).astype(np.float32)
        if i in norm:
            for name in ("weight", "mean", "var"):
                arrays[f"norm_{name}{i}"] = rng.uniform(0.1, 2, n_out).astype(np.float32)
    return arrays


@pytest.mark.parametrize("activation", configs.ACTIVATIONS)
def test_logits_are_those_of_the_model(rng, activation):
    sizes, x = (784, 30, 20, 5), rng.random((7, 784), np.float32)
    arrays, model = arrays_of(sizes, rng), MLP(sizes, activation, rows=7, ops=plain)
    for name, view in model.named_parameters():
        view[...] = arrays[name]
    logits = inference.logits(arrays, configs.preset("m1", activation=activation), x)
    assert np.abs(logits - model.forward(x)).max() <= 1e-5


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_logits_with_batch_normalisation_are_those_of_torch(rng, activation):
    torch = pytest.importorskip("torch")
    sizes, x = (784, 30, 20, 5), rng.random((7, 784), np.float32)
    arrays, layers = arrays_of(sizes, rng, norm=(0, 1)), []
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        values = {name: torch.from_numpy(array) for name, array in arrays.items() if name.endswith(str(i))}
        linear = torch.nn.Linear(n_in, n_out, bias=i == 2)
        linear.weight.data = values[f"weight{i}"].T
        layers.append(linear)
        if i == 2:
            linear.bias.data = values[f"bias{i}"]
            break
        norm = torch.nn.BatchNorm1d(n_out)
        norm.weight.data, norm.bias.data = values[f"norm_weight{i}"], values[f"bias{i}"]
        norm.running_mean, norm.running_var = values[f"norm_mean{i}"], values[f"norm_var{i}"]
        layers += [norm, {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU}[activation](), torch.nn.Dropout(0.3)]
    with torch.no_grad():
        expected = torch.nn.Sequential(*layers).eval()(torch.from_numpy(x)).numpy()
    logits = inference.logits(arrays, configs.preset("m1", activation=activation), x)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_probabilities_sum_to_one_however_large_the_logits(rng):
    arrays = arrays_of((784, 3), rng)
    arrays["bias0"] += np.float32([1e4, 0, -1e4])
    shares = inference.probabilities(arrays, configs.preset("m1"), rng.integers(0, 256, (4, 784), np.uint8))
    assert np.abs(shares.sum(axis=1) - 1).max() <= 1e-12 and (shares[:, 0] > 0.999).all()


# ---- the command

CLASSES = tuple("0123456789")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a checkpoint of a model that has learnt nothing, and pictures."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "c.npz")
    drawn("5").save("five.png")
    drawn("3", paper="black", colour="yellow").save("three.jpg")
    Image.new("RGB", (60, 60), "white").save("blank.png")
    (tmp_path / "text.png").write_text("not a picture")
    return tmp_path


def save_model(path, **changes):
    arrays = arrays_of((784, 16, 10), np.random.default_rng(0)) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    checkpoint.save(path, arrays, configs.preset("m1", hidden=(16,)), CLASSES, "mnist-t10k")


def test_answers_are_lines_of_three_classes(place, capsys):
    assert main(["predict", "--checkpoint", "c.npz", "five.png", "three.jpg"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["five.png", "three.jpg"]
    for line in lines:
        shares = [float(word.rstrip("%")) for word in line[2::2]]
        assert len(set(line[1::2])) == 3 and set(line[1::2]) <= set(CLASSES)
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.1


def test_what_cannot_be_read_is_one_sentence_and_the_rest_is_answered(place, capsys):
    files = ["blank.png", "five.png", "missing.png", "text.png", ".", "three.jpg"]
    assert main(["predict", "--checkpoint", "c.npz", *files, "--json"]) == 2
    out, err = capsys.readouterr()
    answers = json.loads(out)
    assert [answer["file"] for answer in answers] == files
    assert [sorted(answer) for answer in answers].count(["file", "top"]) == 2
    for i in (1, 5):
        assert len(answers[i]["top"]) == 3 and answers[i]["top"][0].keys() == {"class", "probability"}
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["blank.png", "missing.png", "text.png", "."]
    for line, wrong in zip(lines, ("is blank", "does not exist", "is not a readable", "is not a readable")):
        assert line.startswith("error: ") and wrong in line and "; give " in line


def test_answers_to_readable_pictures_do_not_depend_on_the_others(place, capsys):
    main(["predict", "--checkpoint", "c.npz", "five.png", "--json"])
    (alone,) = json.loads(capsys.readouterr().out)
    main(["predict", "--checkpoint", "c.npz", "three.jpg", "text.png", "five.png", "--json"])
    among = json.loads(capsys.readouterr().out)[2]
    assert [one["class"] for one in among["top"]] == [one["class"] for one in alone["top"]]
    assert np.allclose(*([one["probability"] for one in answer["top"]] for answer in (alone, among)), atol=1e-6)


def test_show_draws_what_the_network_saw(place, capsys):
    assert main(["predict", "--checkpoint", "c.npz", "five.png", "text.png", "--show", "seen.png"]) == 2
    shown = np.asarray(Image.open("seen.png").convert("RGB")) / 255
    assert min(shown.shape[:2]) >= 150 and shown.std() > 0.1
    assert main(["predict", "--checkpoint", "c.npz", "text.png", "--show", "none.png"]) == 2
    assert not os.path.exists("none.png")
    capsys.readouterr()
    for name in ("no/folder/seen.png", "seen.nonsense"):
        assert main(["predict", "--checkpoint", "c.npz", "five.png", "--show", name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {name} cannot be written (") and err.count("\n") == 1


def test_the_frame_can_be_chosen(place, capsys):
    answers = {}
    for frame in ("mnist", "emnist", "glyphs"):
        main(["predict", "--checkpoint", "c.npz", "five.png", "--json", "--frame", frame])
        answers[frame] = capsys.readouterr().out
    main(["predict", "--checkpoint", "c.npz", "five.png", "--json"])
    assert capsys.readouterr().out == answers["mnist"] and len(set(answers.values())) == 3


@pytest.mark.parametrize("changes", [
    {"weight1": None}, {"bias0": None}, {"weight0": np.zeros((783, 16), np.float32)},
    {"bias1": np.float32([np.nan] * 10)}, {"weight2": np.zeros((10, 10), np.float32)},
    {"norm_mean0": np.zeros(16, np.float32)}, {"bias1": np.zeros(10, np.int32)},
], ids=str)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_sentence(place, capsys, changes):
    save_model(place / "other.npz", **changes)
    assert main(["predict", "--checkpoint", "other.npz", "five.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: other.npz h") and "; give " in err


def test_a_damaged_checkpoint_and_wrong_options_are_one_sentence(place, capsys):
    with open("c.npz", "rb") as file:
        content = file.read()
    for name, half in (("half.npz", content[: len(content) // 2]), ("empty.npz", b"")):
        (place / name).write_bytes(half)
    for words in (
        ("--checkpoint", "half.npz", "five.png"), ("--checkpoint", "empty.npz", "five.png"),
        ("--checkpoint", "none.npz", "five.png"), ("--checkpoint", "c.npz"), ("five.png",),
        ("--checkpoint", "c.npz", "five.png", "--frame", "square"),
    ):  # fmt: skip
        assert main(["predict", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ")


# ---- a model that has learnt


def learn(dataset, **changes):
    """A trained m1 as a checkpoint, and the data's split."""
    split = data.stratified_split(dataset.labels)
    config = configs.preset("m1", **changes)
    learner = ScratchLearner(config, dataset, cpu("fused"), len(split.train))
    fit(learner, split, config)
    return checkpoint.Checkpoint(learner.arrays(), config, dataset.class_names, dataset.name), split


def classified(model, images):
    return inference.probabilities(model.arrays, model.config, np.reshape(images, (-1, 784))).argmax(axis=1)


@needs_mnist
def test_photographs_of_digits_are_read_as_well_as_the_digits():
    digits = data.load(MNIST)
    model, split = learn(digits, epochs=6)
    right = split.test[classified(model, digits.images[split.test]) == digits.labels[split.test]]
    rng = np.random.default_rng(0)
    chosen = rng.choice(right, 200, replace=False)
    seen = []
    for i, number in enumerate(chosen):
        sheet = np.pad(digits.images[number].reshape(28, 28), 6)
        side = int(rng.integers(50, 150))
        stroke = np.asarray(Image.fromarray(sheet).resize((side, side), Image.Resampling.BICUBIC)) / 255
        colours = ((0.9, 0.88, 0.8), (0.1, 0.1, 0.35)) if i % 2 else ((0.1, 0.2, 0.15), (0.9, 0.9, 0.85))
        seen.append(framing.frame(ink.scan(photographed(stroke, rng, *colours)), "mnist"))
    assert np.mean(classified(model, seen) == digits.labels[chosen]) >= 0.95


def test_printed_characters_are_read_by_a_model_of_glyphs():
    images, labels = glyphs.generate(4000)
    model, _ = learn(data.Dataset("glyphs-4000", images, labels, data.BYMERGE_CLASSES, ""), epochs=12)
    right = {kind: [] for kind in framing.FRAMES}
    for name in ("DejaVuSans", "DejaVuSerif", "STIXGeneral"):
        how = dict(size=60, canvas=(100, 110), name=name, paper="#f0e8d8", colour="#201850")
        scans = [scanned(character, **how) for character in glyphs.CLASSES]
        for kind, hits in right.items():
            hits += list(classified(model, [framing.frame(scan, kind) for scan in scans]) == np.arange(47))
    assert np.mean(right["glyphs"]) >= 0.7
    assert np.mean(right["glyphs"]) > np.mean(right["mnist"]) + 0.05  # the frame matters
