"""Data: documents (`corpus`), ids (`tokenizer`), files of ids (`tokens`, `token_files`), windows (`pipeline`).

    data = prepare(DataConfig())
    batches = train_batches(data.train, seq_len=256, batch_size=16, seed=0)

Shape letters here: B examples in a batch, T positions in an example.
"""

from spdf_jax.data.pipeline import Batch as Batch
from spdf_jax.data.pipeline import train_batches as train_batches
from spdf_jax.data.pipeline import unigram_loss as unigram_loss
from spdf_jax.data.pipeline import validation_batches as validation_batches
from spdf_jax.data.token_files import TokenData as TokenData
from spdf_jax.data.tokenizer import END_OF_TEXT as END_OF_TEXT
from spdf_jax.data.tokenizer import load_tokenizer as load_tokenizer
from spdf_jax.data.tokens import DataConfig as DataConfig
from spdf_jax.data.tokens import prepare as prepare
