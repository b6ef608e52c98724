"""Perplexity, its uncertainty, and comparisons of a cut model with its dense self in the same run."""

from sedac_hf.evaluation.bounds import mean_difference as mean_difference
from sedac_hf.evaluation.bounds import paired_interval as paired_interval
from sedac_hf.evaluation.bounds import upper_bound as upper_bound
from sedac_hf.evaluation.compare import Comparison as Comparison
from sedac_hf.evaluation.compare import compare as compare
from sedac_hf.evaluation.perplexity import PerplexityResult as PerplexityResult
from sedac_hf.evaluation.perplexity import fitting_context as fitting_context
from sedac_hf.evaluation.perplexity import perplexity as perplexity
from sedac_hf.evaluation.scoring import Batch as Batch
from sedac_hf.evaluation.scoring import DocumentScores as DocumentScores
from sedac_hf.evaluation.scoring import check_finite as check_finite
from sedac_hf.evaluation.scoring import kl_to as kl_to
from sedac_hf.evaluation.scoring import make_batch as make_batch
from sedac_hf.evaluation.scoring import nll_of_logits as nll_of_logits
from sedac_hf.evaluation.scoring import score as score
from sedac_hf.evaluation.scoring import scored_logits as scored_logits
from sedac_hf.evaluation.scoring import token_nll as token_nll
from sedac_hf.evaluation.texts import Document as Document
from sedac_hf.evaluation.texts import read_documents as read_documents
from sedac_hf.evaluation.texts import split_documents as split_documents
from sedac_hf.evaluation.texts import stdlib_documents as stdlib_documents
from sedac_hf.evaluation.windows import Window as Window
from sedac_hf.evaluation.windows import WindowSet as WindowSet
from sedac_hf.evaluation.windows import make_windows as make_windows
