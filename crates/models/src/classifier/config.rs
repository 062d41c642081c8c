//! `config.json` of a classifier -> [`ClassifierConfig`].
//!
//! What differs between families is on one page each (`bert.rs`, `vit.rs`, `convnet.rs`). [`registry`] is the list of families;
//! adding one means a page and a row.

use std::path::Path;

use serde_json::Value;

use super::layout::Layout;
use crate::config::{ConfigError, Keys, find_row};
use crate::encoder::{EncoderConfig, probability};
use crate::{bert, convnet, vit};

/// One row of [`registry`]: how a family is recognised, who reads it, and what its tensors are called on disk.
#[derive(Debug)]
pub struct ClassifierFamily {
    /// Value of `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Accepted values of `architectures[0]`, the classifier first. The others give the trunk and start with a fresh head.
    pub architectures: &'static [&'static str],
    /// What the names of the trunk's tensors begin with. A checkpoint of the trunk alone may lack it.
    pub trunk: &'static str,
    /// Parts of names: in memory, on disk. Both are read; the one on disk is written.
    pub renames: &'static [(&'static str, &'static str)],
    /// Parts of names in memory and what very old files have instead; for reading alone.
    pub old_names: &'static [(&'static str, &'static str)],
    /// Parts of names that may be in a file and are not needed: other heads, buffers.
    pub ignorable: &'static [&'static str],
    read: fn(&Keys<'_>) -> Result<Trunk, ConfigError>,
}

/// Every family that can be loaded as a classifier. The error for an unknown architecture prints this list.
pub fn registry() -> &'static [ClassifierFamily] {
    const ROWS: &[ClassifierFamily] = &[
        ClassifierFamily {
            model_type: "bert",
            architectures: &["BertForSequenceClassification", "BertModel", "BertForMaskedLM", "BertForPreTraining"],
            trunk: "bert.",
            renames: &[],
            old_names: bert::OLD_NAMES,
            ignorable: &["cls.", "position_ids"],
            read: bert::read_bert,
        },
        ClassifierFamily {
            model_type: "roberta",
            architectures: &["RobertaForSequenceClassification", "RobertaModel", "RobertaForMaskedLM"],
            trunk: "roberta.",
            renames: &[],
            old_names: bert::OLD_NAMES,
            ignorable: &["lm_head.", "position_ids", "pooler."],
            read: bert::read_roberta,
        },
        ClassifierFamily {
            model_type: "xlm-roberta",
            architectures: &["XLMRobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForMaskedLM"],
            trunk: "roberta.",
            renames: &[],
            old_names: bert::OLD_NAMES,
            ignorable: &["lm_head.", "position_ids", "pooler."],
            read: bert::read_roberta,
        },
        ClassifierFamily {
            model_type: "vit",
            architectures: &["ViTForImageClassification", "ViTModel", "ViTForMaskedImageModeling"],
            trunk: "vit.",
            renames: vit::RENAMES,
            old_names: &[],
            ignorable: &["pooler.", "decoder.", "mask_token"],
            read: vit::read,
        },
        ClassifierFamily {
            model_type: "resnet",
            architectures: &["ResNetForImageClassification", "ResNetModel"],
            trunk: "resnet.",
            renames: &[],
            old_names: &[],
            ignorable: &["num_batches_tracked"],
            read: convnet::read,
        },
    ];
    ROWS
}

/// The part of a model below its head.
#[derive(Debug, Clone, PartialEq)]
pub enum Trunk {
    /// BERT, RoBERTa.
    Text(bert::TextConfig),
    /// ViT.
    Patches(vit::PatchConfig),
    /// ResNet.
    Conv(convnet::ConvConfig),
}

/// Everything that a classifier needs to know about itself.
#[derive(Debug, Clone)]
pub struct ClassifierConfig {
    /// The row of [`registry`].
    pub family: &'static ClassifierFamily,
    /// Sizes and switches below the head.
    pub trunk: Trunk,
    /// Names of the classes in order; a single one means regression.
    pub labels: Vec<String>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Probability that an input of the head's last linear map is dropped in training.
    pub head_dropout: f64,
    /// Dropout of attention weights that the file names. Training runs without it.
    pub unused_dropout: f64,
}

impl ClassifierConfig {
    /// Reads `folder/config.json`; `num_labels` overrides the number of classes in the file.
    ///
    /// # Errors
    /// As [`ClassifierConfig::from_json`], and where the file cannot be read.
    pub fn read(folder: &Path, num_labels: Option<usize>) -> Result<Self, ConfigError> {
        let path = folder.join("config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_json(&text, &path, num_labels),
            Err(source) => Err(ConfigError::Io { origin: path, source }),
        }
    }

    /// Reads the text of a `config.json`; `origin` is only used in error messages.
    ///
    /// # Errors
    /// Names the key, what was expected and what was found.
    pub fn from_json(text: &str, origin: &Path, num_labels: Option<usize>) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| ConfigError::Json { origin: origin.to_path_buf(), source })?;
        let keys = Keys::of_file(&value, origin)?;
        let (family, _) = find_row(&keys, registry(), |row| (row.model_type, row.architectures))?;
        let trunk = (family.read)(&keys)?;
        let head_dropout = match &trunk {
            Trunk::Text(text) => probability(&keys, "classifier_dropout")?.unwrap_or(text.encoder.dropout),
            Trunk::Patches(_) | Trunk::Conv(_) => 0.0,
        };
        let mut labels = labels(&keys, &value)?;
        if let Some(count) = num_labels.filter(|&count| count != labels.len()) {
            labels = numbered(count);
        }
        Ok(Self {
            family,
            trunk,
            labels,
            initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
            head_dropout,
            unused_dropout: probability(&keys, "attention_probs_dropout_prob")?.unwrap_or(0.0),
        })
    }

    /// The modules of the model.
    pub fn layout(&self) -> Layout {
        let labels = self.labels.len();
        match &self.trunk {
            Trunk::Text(config) => config.layout(labels),
            Trunk::Patches(config) => config.layout(labels),
            Trunk::Conv(config) => config.layout(labels),
        }
    }

    /// The transformer, where the model is one.
    pub fn encoder(&self) -> Option<&EncoderConfig> {
        match &self.trunk {
            Trunk::Text(config) => Some(&config.encoder),
            Trunk::Patches(config) => Some(&config.encoder),
            Trunk::Conv(_) => None,
        }
    }

    /// Hidden states of an image.
    pub fn columns(&self) -> usize {
        match &self.trunk {
            Trunk::Patches(config) => config.num_patches() + 1,
            Trunk::Text(_) | Trunk::Conv(_) => 1,
        }
    }

    /// Most tokens of a text that the model has positions for; `None` for images.
    pub fn max_tokens(&self) -> Option<usize> {
        match &self.trunk {
            Trunk::Text(config) => Some(config.max_tokens()),
            _ => None,
        }
    }

    /// Channels, and height and width where the model has fixed ones; `None` for texts.
    pub fn image(&self) -> Option<(usize, Option<[usize; 2]>)> {
        match &self.trunk {
            Trunk::Text(_) => None,
            Trunk::Patches(config) => Some((config.channels, Some(config.image_size))),
            Trunk::Conv(config) => Some((config.channels, None)),
        }
    }
}

/// `LABEL_0`, `LABEL_1`, ... as transformers names classes without names.
pub fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("LABEL_{index}")).collect()
}

/// Class names by `id2label`; two without names where the file has none, as in transformers.
fn labels(keys: &Keys<'_>, value: &Value) -> Result<Vec<String>, ConfigError> {
    let Some(Value::Object(map)) = value.get("id2label") else {
        return Ok(numbered(keys.size("num_labels", 1 << 24)?.unwrap_or(2)));
    };
    let mut labels: Vec<(usize, String)> = vec![];
    for (id, name) in map {
        let (Ok(id), Some(name)) = (id.parse(), name.as_str()) else {
            let expected = "numbers as keys and names as values";
            return Err(keys.invalid("id2label", expected, format!("{id:?}: {name}")));
        };
        labels.push((id, name.to_owned()));
    }
    labels.sort();
    if labels.is_empty() || labels.iter().enumerate().any(|(index, (id, _))| *id != index) {
        let got = labels.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>().join(", ");
        return Err(keys.invalid("id2label", "the numbers from 0 on, each once", got));
    }
    Ok(labels.into_iter().map(|(_, name)| name).collect())
}
