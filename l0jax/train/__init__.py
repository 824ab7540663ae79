"""Training: parameters and gates together, in one compiled step."""

from l0jax.train.compacting import Compaction as Compaction
from l0jax.train.deciding import Decision as Decision
from l0jax.train.epochs import Sweep as Sweep
from l0jax.train.epochs import Totals as Totals
from l0jax.train.epochs import add as add
from l0jax.train.epochs import member_of as member_of
from l0jax.train.epochs import order_of_epoch as order_of_epoch
from l0jax.train.epochs import stack as stack
from l0jax.train.gatings import Chosen as Chosen
from l0jax.train.gatings import Gating as Gating
from l0jax.train.gatings import Learned as Learned
from l0jax.train.gatings import Temperature as Temperature
from l0jax.train.gatings import Ungated as Ungated
from l0jax.train.networks import function as function
from l0jax.train.networks import linen as linen
from l0jax.train.networks import module as module
from l0jax.train.optimizers import gates_apart as gates_apart
from l0jax.train.placement import Sharding as Sharding
from l0jax.train.resuming import Checkpoints as Checkpoints
from l0jax.train.streams import Stream as Stream
from l0jax.train.targets import Target as Target
from l0jax.train.training import Training as Training
from l0jax.train.training import TrainingState as TrainingState
