"""The embedded example's tokenizer: one id per word, `<bos>` put in front of every text by itself."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from red.example.corpus import VOCABULARY

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `SPECIAL_TOKENS + VOCABULARY`.

    `tokenizer("e = 4 ;")` is `<bos> e = 4 ;`: prompts start as training documents do, and `<eos>` is what a model says when it has
    finished, so no text gets it by itself. Padding is on the left, as batched generation wants.
    """
    ids = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *VOCABULARY])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # not Whitespace(): that one splits at punctuation, also inside a special token's brackets
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama has no token_type_ids
    )
