"""The operations that forward passes are written in: one namespace, a module for each kind.

Each makes its result, records what autograd keeps for it, and says what its backward pass makes.
Names and derivatives are PyTorch's (torch v2.13: tools/autograd/derivatives.yaml and
torch/csrc/autograd/FunctionsManual.cpp); a C++ expression keeps its temporaries to its end, and so
do the rules here.
"""

from llmsize.anatomy.operations.elementwise import *
from llmsize.anatomy.operations.indexing import *
from llmsize.anatomy.operations.losses import *
from llmsize.anatomy.operations.norms import *
from llmsize.anatomy.operations.products import *
from llmsize.anatomy.operations.reductions import *
from llmsize.anatomy.operations.rules import *
from llmsize.anatomy.operations.shapes import *
