//! The note in the tensor file of methods that are written as plain LoRA (PiSSA, OLoRA, CorDA, EoRA).
//!
//! It is JSON under the key `lowrank` in the header of `adapter_model.safetensors`, and holds what the LoRA form cannot say, so
//! that a run goes on exactly. Other readers do not see it: to them the folder is the LoRA it claims to be.

use std::path::Path;

use serde_json::{Value, json};

use super::AdapterConfig;
use super::keys::Keys;
use super::method::{CordaMethod, MethodConfig};
use super::write::{number, pattern_map};
use crate::hf::error::HfError;

/// The key of the note in the header of the tensor file.
pub const METADATA_KEY: &str = "lowrank";

/// The factor by which alpha grows when the rank is doubled, so that the scale stays.
fn doubled_alpha(config: &AdapterConfig) -> f64 {
    if config.use_rslora { 2f64.sqrt() } else { 2.0 }
}

impl AdapterConfig {
    /// The settings that `adapter_config.json` shows: those of a LoRA of twice the rank where the method is stored as one.
    pub(super) fn as_stored(&self) -> Self {
        let mut stored = self.clone();
        if self.method.doubles_rank() {
            let factor = doubled_alpha(self);
            stored.r *= 2;
            stored.lora_alpha *= factor;
            stored.rank_pattern.iter_mut().for_each(|(_, rank)| *rank *= 2);
            stored.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= factor);
        }
        stored
    }

    /// The note for the tensor file's header, under [`METADATA_KEY`]; none where `adapter_config.json` says everything.
    pub fn to_metadata(&self) -> Option<String> {
        let own = match &self.method {
            MethodConfig::Pissa { niter } => json!({ "niter": niter }),
            MethodConfig::Olora => json!({}),
            MethodConfig::Corda { corda_method } => json!({ "corda_method": corda_method.name() }),
            MethodConfig::Eora { trained } => json!({ "trained": trained }),
            _ => return None,
        };
        let mut note = json!({
            "method": self.method.name(),
            "r": self.r,
            "lora_alpha": number(self.lora_alpha),
            "rank_pattern": pattern_map(&self.rank_pattern, |rank| Value::from(*rank)),
            "alpha_pattern": pattern_map(&self.alpha_pattern, |alpha| number(*alpha)),
        });
        if let (Value::Object(note), Value::Object(own)) = (&mut note, own) {
            note.extend(own);
        }
        Some(note.to_string())
    }

    /// What the header of a tensor file must hold: the format, and the note where there is one.
    pub fn file_metadata(&self) -> Vec<(&'static str, String)> {
        let format = ("format", "pt".to_string());
        [format].into_iter().chain(self.to_metadata().map(|note| (METADATA_KEY, note))).collect()
    }

    /// The settings with what the note of the tensor file adds to `adapter_config.json`; `origin` is for messages.
    ///
    /// # Errors
    /// The note is not ours, or the settings were changed without it.
    pub fn with_metadata(self, note: &str, origin: &Path) -> Result<Self, HfError> {
        let hint = "the folder was changed by another program: remove the entry to read it as a plain LoRA";
        let bad =
            |reason: String| HfError::bad_file(origin, format!("metadata entry `{METADATA_KEY}`: {reason}"), hint);
        let note: Value = serde_json::from_str(note).map_err(|error| bad(format!("not valid JSON: {error}")))?;
        let Some(map) = note.as_object() else { return Err(bad(format!("expected an object, got {note}"))) };
        let keys = Keys { keys: map, origin };
        let read = Self { method: noted_method(&keys)?, ..self.clone() };
        let wanted = read.with_noted(&keys)?;
        match wanted.as_stored().is_stored_like(&self) {
            true => Ok(wanted),
            false => Err(bad(format!(
                "a {} of rank {} is stored as a LoRA of rank {}, but adapter_config.json says {}",
                wanted.method.name(),
                wanted.r,
                wanted.as_stored().r,
                self.r
            ))),
        }
    }

    fn with_noted(self, keys: &Keys<'_>) -> Result<Self, HfError> {
        let Some(r) = keys.count("r")? else { return keys.fail("r", "missing from the note", "") };
        Ok(Self {
            r,
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(r as f64),
            rank_pattern: keys.ranks()?,
            alpha_pattern: keys.alphas()?,
            ..self
        })
    }

    /// Whether ranks and scales are those of `other`, up to the rounding of a root of two.
    fn is_stored_like(&self, other: &Self) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs();
        let same_alphas = self.alpha_pattern.len() == other.alpha_pattern.len()
            && self.alpha_pattern.iter().zip(&other.alpha_pattern).all(|(a, b)| a.0 == b.0 && near(a.1, b.1));
        self.r == other.r
            && near(self.lora_alpha, other.lora_alpha)
            && self.rank_pattern == other.rank_pattern
            && same_alphas
    }
}

/// The method that a note names, with its settings.
fn noted_method(keys: &Keys<'_>) -> Result<MethodConfig, HfError> {
    match keys.text("method")?.as_deref() {
        Some("pissa") => Ok(MethodConfig::Pissa { niter: keys.count("niter")? }),
        Some("olora") => Ok(MethodConfig::Olora),
        Some("corda") => Ok(MethodConfig::Corda { corda_method: corda_method(keys)? }),
        Some("eora") => Ok(MethodConfig::Eora { trained: keys.flag("trained")? }),
        other => keys.fail(
            "method",
            format!("expected pissa, olora, corda or eora, got {}", other.unwrap_or("nothing")),
            "the file was written by a newer version",
        ),
    }
}

fn corda_method(keys: &Keys<'_>) -> Result<CordaMethod, HfError> {
    match keys.text("corda_method")?.as_deref() {
        Some("ipm") => Ok(CordaMethod::Ipm),
        Some("kpm") => Ok(CordaMethod::Kpm),
        other => keys.fail("corda_method", format!("expected ipm or kpm, got {}", other.unwrap_or("nothing")), ""),
    }
}
