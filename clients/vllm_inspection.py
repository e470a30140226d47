"""Run by vLLM's Python: load a model's folder with its transformers backend, up to the kernels.

python vllm_inspection.py FOLDER
"""

import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs


folder = sys.argv[1]
config = ModelConfig(model=folder, trust_remote_code=True, model_impl="transformers", dtype="float32")
_, architecture = config.registry.resolve_model_cls(config.architectures, config)
assert architecture == "TransformersMultiModalForCausalLM", architecture

processor = MULTIMODAL_REGISTRY.create_processor(config)
own = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert processor.info.get_mm_max_tokens_per_item(256, {"image": 1}) == {"image": own.num_query_tokens}
pictures = [Image.new("RGB", (40, 30), (200, 30, 30)), Image.new("RGB", (30, 40), (0, 30, 200))]
prompt = own.build_prompt("What are these?", num_images=2)
inputs = processor.apply(
    ProcessorInputs(
        prompt=processor.info.get_tokenizer().encode(prompt, add_special_tokens=False),
        mm_data_items=processor.info.parse_mm_data({"image": pictures}),
    ),
    TimingContext(),
)
expected = own(images=pictures, text=prompt, return_tensors="pt")
assert inputs["prompt_token_ids"] == expected["input_ids"][0].tolist()
places = [(place.offset, place.length) for place in inputs["mm_placeholders"]["image"]]
for (offset, length), item, pixels in zip(places, inputs["mm_kwargs"]["image"], expected["pixel_values"], strict=True):
    assert set(inputs["prompt_token_ids"][offset : offset + length]) == {own.image_token_id}
    assert torch.equal(item["pixel_values"].data[0], pixels)

# the backend builds this model, and runs it without a head
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert model.config.image_token_in_table
with torch.no_grad():
    states = model(**expected)[0]
    visual = model.get_image_features(expected["pixel_values"]).pooler_output
assert states.shape == (1, expected["input_ids"].shape[1], model.config.text_config.hidden_size)
assert visual.shape == (2, own.num_query_tokens, model.config.text_config.hidden_size)
assert model.get_encoder(modality="image") is model.vision_model
