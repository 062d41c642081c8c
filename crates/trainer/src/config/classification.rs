//! `[classification]`: what labels are, for `task = "sequence_classification"` and `"image_classification"`.

use serde::{Deserialize, Serialize};

/// `[classification]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClassificationConfig {
    /// Names of the classes in order. Default: those of a checkpoint that has a head; else those of the training data, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// The labels are numbers to come close to, by mean squared error, and not classes. Default false.
    pub regression: bool,
    /// Mirror half of the training images, others in each epoch. Default false.
    pub random_flip: bool,
}
