"""Data: documents (`corpus`), ids (`tokenizer`), files of ids (`tokens`, `token_files`), windows (`pipeline`).

    data = prepare(DataConfig())
    batches = train_batches(data.train, seq_len=256, batch_size=16, seed=0)

To fine-tune: tasks (`tasks`, from `task_files`, `restaurant` or `tfds_tasks`), their `examples`, and `pairs` in batches.

    pairs = encode_task(load_task(TaskConfig("restaurant")), data.tokenizer, 256)
    batches = task_batches(pairs.train, seq_len=256, batch_size=16, seed=0)

Shape letters here: B examples in a batch, T positions in an example.
"""

from spdf_jax.data.examples import Example as Example
from spdf_jax.data.examples import Task as Task
from spdf_jax.data.examples import seen_categories as seen_categories
from spdf_jax.data.mixture import Mixture as Mixture
from spdf_jax.data.mixture import read_shares as read_shares
from spdf_jax.data.pairs import EncodedTask as EncodedTask
from spdf_jax.data.pairs import Pair as Pair
from spdf_jax.data.pairs import decode_texts as decode_texts
from spdf_jax.data.pairs import encode_prompts as encode_prompts
from spdf_jax.data.pairs import encode_task as encode_task
from spdf_jax.data.pairs import length_buckets as length_buckets
from spdf_jax.data.pairs import steps_per_epoch as steps_per_epoch
from spdf_jax.data.pairs import task_batches as task_batches
from spdf_jax.data.pairs import task_validation_batches as task_validation_batches
from spdf_jax.data.pipeline import Batch as Batch
from spdf_jax.data.pipeline import train_batches as train_batches
from spdf_jax.data.pipeline import validation_batches as validation_batches
from spdf_jax.data.tasks import TaskConfig as TaskConfig
from spdf_jax.data.tasks import load_task as load_task
from spdf_jax.data.tasks import prepare_tfds as prepare_tfds
from spdf_jax.data.token_files import TokenData as TokenData
from spdf_jax.data.tokenizer import END_OF_TEXT as END_OF_TEXT
from spdf_jax.data.tokenizer import document_ids as document_ids
from spdf_jax.data.tokenizer import end_of_text_id as end_of_text_id
from spdf_jax.data.tokenizer import holds_tokenizer as holds_tokenizer
from spdf_jax.data.tokenizer import load_tokenizer as load_tokenizer
from spdf_jax.data.tokens import DataConfig as DataConfig
from spdf_jax.data.tokens import cache_folder as cache_folder
from spdf_jax.data.tokens import document_end as document_end
from spdf_jax.data.tokens import parts_of as parts_of
from spdf_jax.data.tokens import prepare as prepare
from spdf_jax.data.unigram import unigram_loss as unigram_loss
