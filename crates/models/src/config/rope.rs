//! Rotary position embeddings: which frequencies a `config.json` asks for, and the tables of cosines and sines.
//!
//! Element `i` and element `i + head_dim/2` of a head are turned as a pair by the angle `position * inv_freq[i]`. The plain
//! frequencies are `theta^(-2i / head_dim)`; the scalings stretch them for longer contexts.

use std::f64::consts::PI;

use super::{ConfigError, DecoderConfig, Keys};

/// One rotary table.
///
/// # Reference
/// RoFormer (Su et al. 2021); YaRN (Peng et al. 2023); the Llama 3.1 scaling is defined by Meta's reference code.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position of each pair, `[head_dim / 2]`, each step rounded to f32 as transformers rounds it.
    pub inv_freq: Vec<f32>,
    /// Factor on cosines and sines (YaRN); 1 otherwise.
    pub attention_factor: f32,
}

/// The scalings by their name in `config.json`.
const KNOWN: &str = "default, linear, llama3 or yarn";
/// Base of the frequencies where no key gives it; the default of all families here but Gemma 3's global table.
const DEFAULT_THETA: f64 = 10_000.0;

impl Rope {
    /// The table of a model that has one: from `rope_scaling` or `rope_parameters`, with `rope_theta` inside or beside it.
    pub(crate) fn read(keys: &Keys<'_>, config: &DecoderConfig) -> Result<Rope, ConfigError> {
        let (name, parameters) = source(keys)?;
        if parameters.as_ref().is_some_and(is_nested) {
            return Err(keys.unsupported(
                name,
                "one set of rotary parameters for all layers",
                "only Gemma 3 has rotary parameters per layer type",
            ));
        }
        let theta = theta(keys, parameters.as_ref(), "rope_theta", DEFAULT_THETA)?;
        build(keys, parameters.as_ref(), theta, config)
    }

    /// The table of one `layer_type` of a model with several. The old spelling has one `rope_scaling`, which is for full
    /// attention only; `theta_key` is where it keeps the base of this table.
    pub(crate) fn read_for_layers(
        keys: &Keys<'_>,
        config: &DecoderConfig,
        layer_type: &str,
        theta_key: &str,
        default_theta: f64,
    ) -> Result<Rope, ConfigError> {
        let (name, parameters) = source(keys)?;
        let own = match parameters {
            Some(nested) if is_nested(&nested) => nested.object(layer_type)?,
            Some(_) if name == "rope_parameters" => {
                return Err(keys.unsupported(
                    name,
                    "the keys full_attention and sliding_attention, each with its rotary parameters",
                    "write rope_theta, rope_local_base_freq and rope_scaling at the top level instead",
                ));
            }
            Some(global) if layer_type == "full_attention" => Some(global),
            _ => None,
        };
        let theta = theta(keys, own.as_ref(), theta_key, default_theta)?;
        build(keys, own.as_ref(), theta, config)
    }
}

impl DecoderConfig {
    /// Cosines and sines, each `[positions.len(), head_dim / 2]` row-major, of rotary table `rope`: the angle is the f32
    /// product of position and frequency, the results are multiplied by the table's attention factor.
    ///
    /// # Panics
    /// If `rope` is not an index of `self.ropes`; those in `self.layers` are.
    pub fn rope_tables(&self, rope: usize, positions: &[i32]) -> (Vec<f32>, Vec<f32>) {
        let Rope { inv_freq, attention_factor } = &self.ropes[rope];
        let size = positions.len() * inv_freq.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for position in positions {
            for frequency in inv_freq {
                let (sine, cosine) = (*position as f32 * frequency).sin_cos();
                cosines.push(cosine * attention_factor);
                sines.push(sine * attention_factor);
            }
        }
        (cosines, sines)
    }
}

/// Where the rotary parameters stand, and they; `rope_scaling` wins, as in transformers.
fn source<'a>(keys: &Keys<'a>) -> Result<(&'static str, Option<Keys<'a>>), ConfigError> {
    if let Some(scaling) = keys.object("rope_scaling")? {
        return Ok(("rope_scaling", Some(scaling)));
    }
    Ok(("rope_parameters", keys.object("rope_parameters")?))
}

fn is_nested(parameters: &Keys<'_>) -> bool {
    let present = |layer_type| !parameters.is_absent_or_null(layer_type);
    present("full_attention") || present("sliding_attention")
}

fn theta(keys: &Keys<'_>, parameters: Option<&Keys<'_>>, key: &str, default: f64) -> Result<f64, ConfigError> {
    let (place, key) = match parameters {
        Some(parameters) if !parameters.is_absent_or_null("rope_theta") => (parameters, "rope_theta"),
        _ => (keys, key),
    };
    let theta = place.positive(key)?.unwrap_or(default);
    if theta <= 1.0 {
        return Err(place.invalid(key, "a number above 1", theta.to_string()));
    }
    Ok(theta)
}

fn build(
    keys: &Keys<'_>,
    parameters: Option<&Keys<'_>>,
    theta: f64,
    config: &DecoderConfig,
) -> Result<Rope, ConfigError> {
    check_whole_head_turns(keys)?;
    let plain = frequencies(theta, config.head_dim);
    let Some(parameters) = parameters else {
        return Ok(Rope { inv_freq: plain, attention_factor: 1.0 });
    };
    check_whole_head_turns(parameters)?;
    // The old spelling of the key is `type`.
    let key = if parameters.is_absent_or_null("rope_type") { "type" } else { "rope_type" };
    match parameters.text(key)?.unwrap_or("default") {
        "default" => Ok(Rope { inv_freq: plain, attention_factor: 1.0 }),
        "linear" => linear(parameters, plain),
        "llama3" => llama3(parameters, plain, config),
        "yarn" => yarn(parameters, theta, config),
        _ => Err(parameters.unsupported(key, KNOWN, "choose a checkpoint without this kind of rotary scaling")),
    }
}

fn check_whole_head_turns(keys: &Keys<'_>) -> Result<(), ConfigError> {
    match keys.number("partial_rotary_factor")? {
        Some(share) if share != 1.0 => Err(keys.unsupported(
            "partial_rotary_factor",
            "1 (the whole head turns)",
            "choose a checkpoint whose heads are rotated whole",
        )),
        _ => Ok(()),
    }
}

/// `theta^(2i / head_dim)`: positions per radian of pair `i`. The power is taken in f64 and rounded once, so that it does
/// not depend on the platform's `powf`.
fn periods(theta: f64, head_dim: usize) -> Vec<f32> {
    let exponent = |pair: usize| (2 * pair) as f32 / head_dim as f32;
    (0..head_dim / 2).map(|pair| (theta as f32 as f64).powf(exponent(pair) as f64) as f32).collect()
}

fn frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    periods(theta, head_dim).into_iter().map(|period| 1.0 / period).collect()
}

/// Positions are interpolated evenly: all frequencies divided by `factor`.
fn linear(parameters: &Keys<'_>, plain: Vec<f32>) -> Result<Rope, ConfigError> {
    let factor = parameters.required_positive("factor")? as f32;
    let inv_freq = plain.into_iter().map(|frequency| frequency / factor).collect();
    Ok(Rope { inv_freq, attention_factor: 1.0 })
}

/// Wavelengths shorter than `original / high_freq_factor` stay, those longer than `original / low_freq_factor` are
/// stretched by `factor`, and between the two the frequency is blended.
fn llama3(parameters: &Keys<'_>, plain: Vec<f32>, config: &DecoderConfig) -> Result<Rope, ConfigError> {
    let factor = parameters.required_positive("factor")? as f32;
    let low = parameters.required_positive("low_freq_factor")?;
    let high = parameters.required_positive("high_freq_factor")?;
    let original = original_length(parameters, config)?;
    if high <= low {
        let expected = format!("a number above low_freq_factor ({low})");
        return Err(parameters.invalid("high_freq_factor", expected, high.to_string()));
    }
    let (longest, shortest) = ((original / low) as f32, (original / high) as f32);
    let scale = |frequency: f32| {
        let wavelength = (1.0 / frequency) * (2.0 * PI) as f32;
        if wavelength > longest {
            return frequency / factor;
        }
        if wavelength < shortest {
            return frequency;
        }
        let smooth = ((1.0 / wavelength) * original as f32 - low as f32) / (high - low) as f32;
        (1.0 - smooth) * frequency / factor + smooth * frequency
    };
    Ok(Rope { inv_freq: plain.into_iter().map(scale).collect(), attention_factor: 1.0 })
}

/// YaRN: pairs that turn more than `beta_fast` times within the original context stay, those below `beta_slow` turns are
/// interpolated by `factor`, with a linear ramp over the pair's index between; cosines and sines grow by the attention factor.
fn yarn(parameters: &Keys<'_>, theta: f64, config: &DecoderConfig) -> Result<Rope, ConfigError> {
    let original = original_length(parameters, config)?;
    let factor = parameters.positive("factor")?.unwrap_or(config.max_position_embeddings as f64 / original);
    let head_dim = config.head_dim as f64;
    // Index at which a pair makes `turns` turns within the original context.
    let index_of = |turns: f64| head_dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let mut first = index_of(non_zero(parameters, "beta_fast")?.unwrap_or(32.0));
    let mut last = index_of(non_zero(parameters, "beta_slow")?.unwrap_or(1.0));
    if parameters.flag("truncate")?.unwrap_or(true) {
        (first, last) = (first.floor(), last.ceil());
    }
    (first, last) = (first.max(0.0), last.min(head_dim - 1.0));
    // An empty ramp is a step.
    let width = if first == last { 0.001 } else { last - first };
    let blend = |(pair, period): (usize, f32)| {
        let kept = 1.0 - ((pair as f32 - first as f32) / width as f32).clamp(0.0, 1.0);
        let interpolated = 1.0 / (factor as f32 * period);
        interpolated * (1.0 - kept) + (1.0 / period) * kept
    };
    let inv_freq = periods(theta, config.head_dim).into_iter().enumerate().map(blend).collect();
    Ok(Rope { inv_freq, attention_factor: yarn_attention_factor(parameters, factor)? as f32 })
}

/// `attention_factor` if given, else `0.1 ln(factor) + 1`, or the ratio of two such terms with the weights `mscale` and
/// `mscale_all_dim`.
fn yarn_attention_factor(parameters: &Keys<'_>, factor: f64) -> Result<f64, ConfigError> {
    if let Some(given) = parameters.positive("attention_factor")? {
        return Ok(given);
    }
    let term = |weight: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    };
    match (non_zero(parameters, "mscale")?, non_zero(parameters, "mscale_all_dim")?) {
        (Some(weight), Some(weight_all_dim)) => Ok(term(weight) / term(weight_all_dim)),
        _ => Ok(term(1.0)),
    }
}

/// A number above 0, where 0 counts as absent.
fn non_zero(parameters: &Keys<'_>, key: &str) -> Result<Option<f64>, ConfigError> {
    match parameters.number(key)? {
        Some(0.0) => Ok(None),
        _ => parameters.positive(key),
    }
}

/// Length of the context that the model was trained with before it was extended.
fn original_length(parameters: &Keys<'_>, config: &DecoderConfig) -> Result<f64, ConfigError> {
    let given = parameters.positive("original_max_position_embeddings")?;
    Ok(given.unwrap_or(config.max_position_embeddings as f64))
}
