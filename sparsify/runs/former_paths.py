"""Import paths that components had when the first results were published.

A run's key was then a hash of these paths. They stand in for the component's name in the hash ever since, so that no
published key moved when the code did. Nothing is added here: a new component is hashed by its group and name.
"""

FORMER_PATHS = {
    "GGUFModel": "sparsify.models.GGUFModel",
    "HubModel": "sparsify.models.HubModel",
    "ShapeModel": "sparsify.models.ShapeModel",
    "Windows": "sparsify.data.Windows",
    "Reading": "sparsify.analysis.absorption.Reading",
    "AbsorptionCurves": "sparsify.evaluation.absorption.AbsorptionCurves",
    "ErrorGrowth": "sparsify.evaluation.error_growth.ErrorGrowth",
    "Perplexity": "sparsify.evaluation.perplexity.Perplexity",
    "ZeroShot": "sparsify.evaluation.zeroshot.ZeroShot",
    "allocator/absorption": "sparsify.allocators.absorption.AbsorptionCorrected",
    "allocator/alphapruning": "sparsify.allocators.spectral.AlphaPruning",
    "allocator/als": "sparsify.allocators.als.ALS",
    "allocator/atp": "sparsify.allocators.arithmetic.Arithmetic",
    "allocator/atp_relative": "sparsify.allocators.arithmetic.RelativeProgression",
    "allocator/blend": "sparsify.allocators.blend.Blend",
    "allocator/dlp": "sparsify.allocators.dlp.DLP",
    "allocator/dsa": "sparsify.allocators.dsa.DSA",
    "allocator/equimarginal": "sparsify.allocators.equimarginal.Equimarginal",
    "allocator/er": "sparsify.allocators.erdos_renyi.ErdosRenyi",
    "allocator/er_plus": "sparsify.allocators.erdos_renyi.ErdosRenyiPlus",
    "allocator/global": "sparsify.allocators.pooled.Global",
    "allocator/lamp": "sparsify.allocators.pooled.LAMP",
    "allocator/lsa": "sparsify.allocators.lsa.LSA",
    "allocator/neuronal": "sparsify.allocators.neuronal.NeuronAL",
    "allocator/owl": "sparsify.allocators.owl.OWL",
    "allocator/search": "sparsify.allocators.search.Search",
    "allocator/uniform": "sparsify.allocators.uniform.Uniform",
    "method/oneshot": "sparsify.methods.oneshot.OneShot",
    "perturbation/noise": "sparsify.analysis.perturbation.Noise",
    "perturbation/pruned": "sparsify.analysis.perturbation.Pruned",
    "pruner/magnitude": "sparsify.pruners.magnitude.Magnitude",
    "pruner/ria": "sparsify.pruners.ria.RIA",
    "pruner/sparsegpt": "sparsify.pruners.sparsegpt.SparseGPT",
    "pruner/wanda": "sparsify.pruners.wanda.Wanda",
}
