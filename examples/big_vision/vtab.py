r"""VTAB-1K for Big Vision's own train.py: the splits and labels of ttc_jax.

  python -m big_vision.train --config=vtab.py:task=dtd,protocol=final \
      --config.lr=0.01 --workdir=DIR

protocol=val trains on 800 images and reports the 200, by which the learning
rate is chosen; protocol=final trains on the 1,000 and reports the test set.
method=linear trains the head alone and adds the closed-form probe of all
training images, where the label is a feature of the data set.

The recipe is Big Vision's (google-research/big_vision, configs/transfer.py);
the splits and rules of labels are those of VTAB (google-research/
task_adaptation), as ttc_jax has them. This file needs Big Vision alone; some
tasks need ops_vtab.py in big_vision/pp, see README.md.
"""
import big_vision.configs.common as bvcc
import ml_collections as mlc

# task: (TFDS, "val" split, test split, classes, key of the label; "" is made by
# ops_vtab). Training is on train[:800].
TASKS = {
    "cifar100": ("cifar100:3.*.*", "train[45000:45200]", "test", 100, "label"),
    "caltech101": ("caltech101:3.*.*", "train[2754:2954]", "test", 102,
                   "label"),
    "dtd": ("dtd:3.*.*", "validation[:200]", "test", 47, "label"),
    "oxford_flowers102": ("oxford_flowers102:2.*.*", "validation[:200]", "test",
                          102, "label"),
    "oxford_iiit_pet": ("oxford_iiit_pet:3.*.*", "train[2944:3144]", "test", 37,
                        "label"),
    "svhn": ("svhn_cropped:3.*.*", "train[65931:66131]", "test", 10, "label"),
    "sun397": ("sun397/tfds:4.*.*", "validation[:200]", "test", 397, "label"),
    "patch_camelyon": ("patch_camelyon:2.*.*", "validation[:200]", "test", 2,
                       "label"),
    "eurosat": ("eurosat/rgb:2.*.*", "train[16200:16400]", "train[21600:]", 10,
                "label"),
    "resisc45": ("resisc45:3.*.*", "train[18900:19100]", "train[25200:]", 45,
                 "label"),
    "diabetic_retinopathy": (
        "diabetic_retinopathy_detection/btgraham-300:3.*.*", "validation[:200]",
        "test", 5, "label"),
    "clevr_count": ("clevr:3.*.*", "train[63000:63200]", "validation", 8, ""),
    "clevr_dist": ("clevr:3.*.*", "train[63000:63200]", "validation", 6, ""),
    "dmlab": ("dmlab:2.0.1", "validation[:200]", "test", 6, "label"),
    "kitti": ("kitti:3.1.0", "validation[:200]", "test", 4, ""),
    "dsprites_loc": ("dsprites:2.*.*", "train[589824:590024]", "train[663552:]",
                     16, ""),
    "dsprites_ori": ("dsprites:2.*.*", "train[589824:590024]", "train[663552:]",
                     16, ""),
    "smallnorb_azi": ("smallnorb:2.*.*", "test[:200]", "test[50%:]", 18,
                      "label_azimuth"),
    "smallnorb_ele": ("smallnorb:2.*.*", "test[:200]", "test[50%:]", 9,
                      "label_elevation"),
}
TRAIN = "train[:800]"
BINARY = ("dsprites_loc", "dsprites_ori")  # pixels are 0 and 1


def get_config(arg=None):
  arg = bvcc.parse_arg(
      arg, task="dtd", protocol="val", method="full", crop="resmall_crop",
      size=384, model="howto-i21k-B/16", variant="B/16", pool="tok",
      steps=500, warmup=100, batch=512)
  name, val, test, classes, key = TASKS[arg.task]
  trained, reported, split = {
      "val": (TRAIN, "val", val), "final": (f"{TRAIN}+{val}", "test", test),
  }[arg.protocol]
  training, use = _pixels(arg)
  labels = (f'{"" if key else f"vtab_label({arg.task!r})|"}'
            f'onehot({classes}, key="{key or "label"}", key_result="labels")|'
            'keep("image", "labels")')

  config = mlc.ConfigDict()
  config.update(dict(task=arg.task, protocol=arg.protocol, method=arg.method))
  config.input = dict(
      data=dict(name=name, split=trained), batch_size=arg.batch,
      shuffle_buffer_size=50_000, pp=f"{training}|{labels}")
  if not key or arg.task in BINARY:
    config.pp_modules = ["ops_general", "ops_image", "ops_vtab"]
  config.num_classes = classes
  config.loss = "softmax_xent"
  config.mixup = dict(p=0.0)
  config.seed = 0

  config.model_name = "vit"
  config.model = dict(variant=arg.variant, pool_type=arg.pool)
  config.model_init = arg.model
  # The head stays as it is made: zero.
  config.model_load = dict(dont_load=["head/kernel", "head/bias"])

  config.total_steps = arg.steps
  config.optax_name = "big_vision.momentum_hp"
  config.grad_clip_norm = 1.0
  config.wd = None
  config.lr = 0.01
  schedule = dict(warmup_steps=arg.warmup, decay_type="cosine")
  config.schedule = {
      "full": schedule, "linear": [("head/.*", schedule), (".*", None)],
  }[arg.method]

  config.log_training_steps = 10
  config.ckpt_steps = 1000
  config.evals = {reported: dict(
      type="classification", data=dict(name=name, split=split),
      loss_name="softmax_xent", pp_fn=f"{use}|{labels}", log_steps=arg.steps)}
  if arg.method == "linear" and key:
    config.evals.fewshot = _fewshot(arg, name, trained, split, use, key)
  return config


def _pixels(arg):
  """Returns the preprocessing of (training images, images in use)."""
  large = round(arg.size * 448 / 384)
  crop = {
      "resmall_crop": f"resize_small({large})|random_crop({arg.size})|flip_lr",
      "inception_crop": f"inception_crop({arg.size})|flip_lr",
      "none": f"resize({arg.size})"}[arg.crop]
  use = (crop if arg.crop == "none" else
         f"resize_small({large})|central_crop({arg.size})")
  first = "decode|vtab_binary" if arg.task in BINARY else "decode"
  return tuple(f"{first}|{x}|value_range(-1, 1)" for x in (crop, use))


def _fewshot(arg, name, trained, split, use, key):
  """The evaluator of the closed-form probe, on all training images."""
  shots = 1000  # of a class, at most
  pp = f'{use}|keep("image", "{key}")'
  return dict(
      type="fewshot_lsr", datasets={arg.task: (name, trained, split)},
      shots=(shots,), num_seeds=1, l2_reg=2.0 ** 10, label_key=key,
      representation_layer="pre_logits", pp_train=pp, pp_eval=pp,
      display_first=((arg.task, shots),), log_steps=arg.steps)
