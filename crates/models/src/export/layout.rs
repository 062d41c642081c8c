//! How one LoRA configuration describes modules of different ranks and scales.

use std::collections::BTreeMap;

use crate::hf::peft::ModulePattern;

/// Rank and alpha of a folder, and what single modules have instead.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The rank that most modules have.
    pub r: usize,
    /// Gives the scale `lora_alpha / r` that all modules have.
    pub lora_alpha: f64,
    /// Ranks of the other modules.
    pub rank_pattern: Vec<(ModulePattern, usize)>,
    /// Their alphas, for the same scale.
    pub alpha_pattern: Vec<(ModulePattern, f64)>,
    /// What the output factor of each module is multiplied by, because its scale is another: 1 for most.
    pub factors: Vec<f64>,
}

/// Describes modules by name, rank and scale.
///
/// ```
/// use lowrank_models::export::layout;
///
/// let found = layout(&[("a.q_proj", 8, 2.0), ("a.v_proj", 4, 2.0), ("b.q_proj", 8, 1.0), ("b.v_proj", 4, 2.0), ("c.q_proj", 8, 2.0)]);
/// assert_eq!((found.r, found.lora_alpha), (8, 16.0));
/// assert_eq!(found.rank_pattern[0].0.text(), "v_proj");
/// assert_eq!((found.rank_pattern[0].1, found.alpha_pattern[0].1), (4, 8.0));
/// assert_eq!(found.factors, [1.0, 1.0, 0.5, 1.0, 1.0]);
/// ```
pub fn layout(modules: &[(&str, usize, f64)]) -> Layout {
    let r = most_frequent(modules.iter().map(|(_, rank, _)| *rank)).unwrap_or(1);
    let scale = modules.iter().map(|(_, _, scale)| scale.to_bits()).filter(|bits| f64::from_bits(*bits) != 0.0);
    let scale = most_frequent(scale).map_or(1.0, f64::from_bits);
    let others = patterns(modules, r);
    Layout {
        r,
        lora_alpha: scale * r as f64,
        alpha_pattern: others.iter().map(|(pattern, rank)| (pattern.clone(), scale * *rank as f64)).collect(),
        rank_pattern: others,
        factors: modules.iter().map(|(_, _, own)| own / scale).collect(),
    }
}

/// The value that occurs most often, the largest one of several.
fn most_frequent<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(value, count)| (*count, *value)).map(|(value, _)| value)
}

/// Names of the modules whose rank is not `r`: the last part, where all modules of that name have the same rank.
fn patterns(modules: &[(&str, usize, f64)], r: usize) -> Vec<(ModulePattern, usize)> {
    let mut by_end: BTreeMap<&str, Vec<(&str, usize)>> = BTreeMap::new();
    for (name, rank, _) in modules {
        by_end.entry(name.rsplit('.').next().unwrap_or(name)).or_default().push((name, *rank));
    }
    let mut found = vec![];
    for (end, group) in by_end {
        let first = group[0].1;
        if group.iter().all(|(_, rank)| *rank == first) {
            found.push((end, first));
        } else {
            found.extend(group);
        }
    }
    let others = found.into_iter().filter(|(_, rank)| *rank != r);
    // An escaped name is a regular expression.
    others.filter_map(|(name, rank)| Some((ModulePattern::ending(&regex::escape(name)).ok()?, rank))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::AdapterConfig;
    use crate::hf::peft::Modules;

    /// A reader of the configuration finds every module's rank, and one scale.
    #[test]
    fn peft_finds_the_rank_of_every_module_and_one_scale() {
        let names = |layer: usize, end: &str| format!("model.layers.{layer}.self_attn.{end}");
        let mut modules = vec![];
        for layer in 0..12 {
            modules.push((names(layer, "q_proj"), 8, 0.5));
            modules.push((names(layer, "v_proj"), 3, 0.5));
            modules.push((names(layer, "o_proj"), if layer == 1 { 5 } else { 8 }, 2.0));
        }
        let rows: Vec<(&str, usize, f64)> = modules.iter().map(|(name, r, s)| (name.as_str(), *r, *s)).collect();
        let found = layout(&rows);
        assert_eq!((found.r, found.lora_alpha, found.rank_pattern.len()), (8, 4.0, 2));
        let config = AdapterConfig {
            rank_pattern: found.rank_pattern.clone(),
            alpha_pattern: found.alpha_pattern.clone(),
            ..AdapterConfig::new(found.r, found.lora_alpha, Modules::AllLinear)
        };
        for ((name, rank, scale), factor) in rows.iter().zip(&found.factors) {
            assert_eq!(config.rank_of(name), *rank, "{name}");
            assert_eq!((config.scale_of(name), config.scale_of(name) * factor), (0.5, *scale), "{name}");
        }
    }

    #[test]
    fn equal_modules_need_no_patterns_and_a_scale_of_zero_is_kept() {
        let found = layout(&[("a", 4, 0.0), ("b", 4, 0.0)]);
        assert_eq!((found.r, found.lora_alpha, found.factors), (4, 4.0, vec![0.0, 0.0]));
        assert!(found.rank_pattern.is_empty() && found.alpha_pattern.is_empty());
    }
}
