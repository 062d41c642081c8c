//! Keys of the tensor file: which module a tensor belongs to, and what it is there.
//!
//! peft puts `base_model.model.` before a module's name and `.weight` behind what is a module in torch; the folders of methods
//! that peft does not have use the bare module name. Random bases that all layers share have no module.

/// How the keys of a tensor file are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyForm {
    /// As peft writes them: `base_model.model.layers.0.q_proj.lora_A.weight`.
    Peft,
    /// As methods that peft does not have write them: `layers.0.q_proj.lora_A`.
    Own,
}

/// What a tensor is in the module it belongs to, with its shape on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// `lora_A` `[r, in]`, of a convolution `[r, in, kh, kw]`; of FLoRA `[r_in, in]`.
    A,
    /// `lora_B` `[out, r]`, of a convolution `[out, r, 1, 1]`; of FLoRA `[out, r_out]`.
    B,
    /// `lora_embedding_A` `[r, vocab]`.
    EmbeddingA,
    /// `lora_embedding_B` `[dim, r]`.
    EmbeddingB,
    /// DoRA's `lora_magnitude_vector` `[out]`.
    Magnitude,
    /// VeRA's `vera_lambda_d` `[r]`.
    VeraD,
    /// VeRA's `vera_lambda_b` `[out]`.
    VeraB,
    /// VeRA's shared `vera_A` `[r, largest in]`; no module.
    VeraBaseA,
    /// VeRA's shared `vera_B` `[largest out, r]`; no module.
    VeraBaseB,
    /// RandLoRA's `randlora_lambda` `[r, n]`.
    RandLambda,
    /// RandLoRA's `randlora_gamma` `[n, min(in, out)]`.
    RandGamma,
    /// RandLoRA's shared `randlora_A` `[r, 1, largest min]`; peft repeats it in every module.
    RandBaseA,
    /// RandLoRA's shared `randlora_B` `[largest max, largest n, r]`; peft repeats it in every module.
    RandBaseB,
    /// HRA's `hra_u` `[in, r]`.
    HraU,
    /// OFT's `oft_R` `[blocks, b (b - 1) / 2]`.
    OftR,
    /// The core `lora_R` `[r, r]` between A and B: `y = x A^T R^T B^T`; of FLoRA `[r_out, r_in]`, of
    /// its convolutions `[r_out, r_in, r_rows, r_columns]`.
    Core,
    /// FLoRA's `lora_rows` `[kh, r_rows]` of a convolution.
    Rows,
    /// FLoRA's `lora_columns` `[kw, r_columns]` of a convolution.
    Columns,
    /// SVFit's `sigma` `[r]`: the trained singular values.
    Sigma,
    /// A whole parameter of a module to save; the name is that of the base model's parameter, such as `lm_head.weight`.
    Saved,
    /// A copy of the base model's weight that peft adds where an embedding is adapted; named like [`Part::Saved`].
    BaseCopy,
}

/// Names of everything but whole parameters.
const NAMES: &[(Part, &str)] = &[
    (Part::A, "lora_A"),
    (Part::B, "lora_B"),
    (Part::EmbeddingA, "lora_embedding_A"),
    (Part::EmbeddingB, "lora_embedding_B"),
    (Part::Magnitude, "lora_magnitude_vector"),
    (Part::VeraD, "vera_lambda_d"),
    (Part::VeraB, "vera_lambda_b"),
    (Part::VeraBaseA, "vera_A"),
    (Part::VeraBaseB, "vera_B"),
    (Part::RandLambda, "randlora_lambda"),
    (Part::RandGamma, "randlora_gamma"),
    (Part::RandBaseA, "randlora_A"),
    (Part::RandBaseB, "randlora_B"),
    (Part::HraU, "hra_u"),
    (Part::OftR, "oft_R"),
    (Part::Core, "lora_R"),
    (Part::Rows, "lora_rows"),
    (Part::Columns, "lora_columns"),
    (Part::Sigma, "sigma"),
];

/// What only the names of adapters' tensors begin with.
const MARKS: &[&str] = &["lora_", "vera_", "randlora_", "oft_", "boft_", "hra_", "ia3_"];

/// What a tensor of an adapter file is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdapterTensor {
    /// The module, by its name in the base model; empty for a basis that all modules share. Of [`Part::Saved`] and
    /// [`Part::BaseCopy`] the whole name of the parameter.
    pub module: String,
    /// What it is there.
    pub part: Part,
}

impl AdapterTensor {
    /// A part of a module.
    pub fn new(module: impl Into<String>, part: Part) -> Self {
        Self { module: module.into(), part }
    }

    /// Reads a key of the tensor file; `None` where it is not one of these (another method's tensor, or a foreign prefix).
    pub fn from_key(key: &str, form: KeyForm) -> Option<Self> {
        let name = match form {
            KeyForm::Own => key.to_string(),
            KeyForm::Peft => without_prefix(key)?,
        };
        let (module, last) = name.rsplit_once('.').unwrap_or(("", &name));
        if let Some((part, _)) = NAMES.iter().find(|(part, name)| *name == last && part.is_in(form)) {
            return (!module.is_empty() || part.is_shared()).then(|| Self::new(module, *part));
        }
        if let Some((module, parameter)) = name.split_once(".base_layer.") {
            return Some(Self::new(format!("{module}.{parameter}"), Part::BaseCopy));
        }
        let is_other_method = name.split('.').any(|part| MARKS.iter().any(|mark| part.starts_with(mark)));
        (!is_other_method).then_some(Self::new(name, Part::Saved))
    }

    /// The key in the tensor file.
    pub fn key(&self, form: KeyForm) -> String {
        let Self { module, part } = self;
        let prefix = match form {
            KeyForm::Own => "",
            // The bases that all layers share hang on the adapter itself.
            KeyForm::Peft if module.is_empty() => "base_model.",
            KeyForm::Peft => "base_model.model.",
        };
        let dot = if module.is_empty() { "" } else { "." };
        if let Some((_, name)) = NAMES.iter().find(|(known, _)| known == part) {
            let weight = if form == KeyForm::Peft && part.is_torch_module() { ".weight" } else { "" };
            return format!("{prefix}{module}{dot}{name}{weight}");
        }
        match (part, module.rsplit_once('.')) {
            (Part::BaseCopy, Some((module, last))) => format!("{prefix}{module}.base_layer.{last}"),
            _ => format!("{prefix}{module}"),
        }
    }
}

impl Part {
    /// Whether files of this form have it.
    fn is_in(self, form: KeyForm) -> bool {
        form == KeyForm::Own || !matches!(self, Self::Core | Self::Rows | Self::Columns | Self::Sigma)
    }

    /// Whether it is the weight of a module in torch, which its key then says.
    fn is_torch_module(self) -> bool {
        matches!(self, Self::A | Self::B | Self::OftR)
    }

    /// Whether it may stand for all modules together.
    fn is_shared(self) -> bool {
        matches!(self, Self::VeraBaseA | Self::VeraBaseB | Self::RandBaseA | Self::RandBaseB)
    }
}

/// The name behind peft's prefix, without a part's `.weight` and what some writers keep of peft's names in memory.
fn without_prefix(key: &str) -> Option<String> {
    let name = match key.strip_prefix("base_model.model.") {
        Some(name) => name,
        None => key.strip_prefix("base_model.").filter(|name| !name.contains('.') || name.ends_with(".default"))?,
    };
    let name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".").replace(".default", "");
    let of_module = name.strip_suffix(".weight").filter(|stem| {
        // In memory, DoRA's magnitude is the weight of a module too.
        ["lora_A", "lora_B", "oft_R", "lora_magnitude_vector"].iter().any(|part| stem.ends_with(&format!(".{part}")))
    });
    Some(of_module.unwrap_or(&name).to_string())
}
