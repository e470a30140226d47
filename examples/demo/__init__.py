"""`make demo`: real backbones, real photographs, the stock Trainer, and captions by a process without lorgnette."""

from lorgnette.trainer.messages import quiet_libraries


quiet_libraries()  # before modules of the demo import tqdm, which reads its settings then
