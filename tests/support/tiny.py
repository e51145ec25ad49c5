"""A tiny model with a tokenizer of characters, in memory or as a folder."""

from families import COMMON, model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a printable character; all others are `<pad>`."""
    vocabulary = {"<pad>": 0, "<s>": 1} | {chr(32 + i): 2 + i for i in range(COMMON["vocab_size"] - 2)}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    built.decoder = decoders.Fuse()
    own = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", unk_token="<pad>", bos_token="<s>")
    own.chat_template = template
    return own


def save(folder, family: str = "llama") -> str:
    """A folder that `from_pretrained` reads."""
    model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
