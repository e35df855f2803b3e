"""The one dispatcher: who computes an op, asked once for each kind of call.

An op is declared once, by its reference: ``Op(name, reference, fake, public=..., check=...)`` reads
the schema of ``torch.ops.diffusion_fast.<name>`` off the reference's signature. Its backends
(:class:`Backend`) compute the same function with the same arguments. A public function passes its
arguments on, ``return _OP(x, weight, bias, ...)``; all else happens in ``Op.__call__``:

1. under autocast the op's policy casts the arguments (:mod:`.autocast`);
2. the call's signature is looked up. It holds what any choice can depend on: shapes, strides,
   dtypes, devices of all tensors, all other values, gradients, torch.func, the backends asked for;
3. at its first call ``op.resolve(signature, args)`` checks the arguments and asks the backends in
   turn: ``machine()`` and ``supports(*args)`` answer at once with reasons why not
   (an empty list: it can), ``ready(*args)`` may compile or measure;
4. what was found is called with the arguments, then and at every later call of that signature.

So there is nothing to prepare or keep at the place of a call: the engine, training and users call
the same public functions, at the price of one look-up. The registered operator, to which
torch.compile and recorded gradients go, resolves in the same way. ``explain(name, ...)`` takes the
arguments of the public function, stops at step 3 and neither compiles nor measures.
"""

from . import autocast, checks, triton
from .backend import BACKENDS, Backend, BackendError, known_ops, use_backend
from .checks import needs_gradient
from .explain import Choice, explain
from .op import Op

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "Choice",
    "Op",
    "autocast",
    "checks",
    "explain",
    "known_ops",
    "needs_gradient",
    "triton",
    "use_backend",
]
