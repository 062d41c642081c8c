//! Adam on moments that are kept in 8 bits (arXiv 2110.02861), as bitsandbytes' blockwise AdamW computes it.
//!
//! Per element, in f32: `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`;
//! `p = (1 - lr wd) p - lr sqrt(c2) / c1 * m / (sqrt(v) + sqrt(c2) eps)` with `c1 = 1 - b1^t`, `c2 = 1 - b2^t` (torch's
//! form). The parameter sees the new moments before they are rounded to codes. Two rules keep the codes harmless: a
//! negative m never gets the code of 0, so its sign is kept; where v is not finite, both moments become 0 and the
//! parameter stays.
//!
//! State: `2 + 8 / block` bytes a value.

use super::dynamic8::{Blockwise8, Map, largest_magnitude};

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam8 {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Decoupled weight decay, applied before the update.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
}

/// Both moments of one tensor, flattened.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments8 {
    /// m, in the signed map.
    pub first: Blockwise8,
    /// v, in the unsigned map.
    pub second: Blockwise8,
}

impl Moments8 {
    /// Zeros.
    ///
    /// # Panics
    /// Where `block` is 0.
    pub fn zeros(len: usize, block: usize) -> Self {
        Self {
            first: Blockwise8::zeros(len, Map::signed(), block),
            second: Blockwise8::zeros(len, Map::unsigned(), block),
        }
    }

    /// Replaces both moments by these values.
    pub fn set(&mut self, first: &[f32], second: &[f32]) {
        let block = self.first.block;
        encode(first, Map::signed(), &mut self.first.codes, &mut self.first.absmax, block);
        encode(second, Map::unsigned(), &mut self.second.codes, &mut self.second.absmax, block);
    }

    /// Updates a parameter with its gradient, both flattened as the moments are.
    ///
    /// # Panics
    /// Where the lengths differ.
    pub fn step(&mut self, parameter: &mut [f32], gradient: &[f32], rule: Adam8) {
        let (len, block) = (self.first.codes.len(), self.first.block);
        assert!(parameter.len() == len && gradient.len() == len, "{len} moments, {} gradients", gradient.len());
        let (c1, c2) = (1.0 - rule.betas.0.powi(rule.step as i32), 1.0 - rule.betas.1.powi(rule.step as i32));
        let (b1, b2) = (rule.betas.0 as f32, rule.betas.1 as f32);
        let (d1, d2) = ((1.0 - rule.betas.0) as f32, (1.0 - rule.betas.1) as f32);
        let decay = (1.0 - rule.learning_rate * rule.weight_decay) as f32;
        let step_size = (rule.learning_rate * c2.sqrt() / c1) as f32;
        let eps = (c2.sqrt() * rule.eps) as f32;
        let (first_map, second_map) = (Map::signed(), Map::unsigned());
        let (mut m, mut v) = (vec![0.0f32; block.min(len)], vec![0.0f32; block.min(len)]);

        for (index, (parameter, gradient)) in parameter.chunks_mut(block).zip(gradient.chunks(block)).enumerate() {
            let range = index * block..index * block + gradient.len();
            let (m, v) = (&mut m[..gradient.len()], &mut v[..gradient.len()]);
            let first_codes = &mut self.first.codes[range.clone()];
            let second_codes = &mut self.second.codes[range];
            // The look-ups apart from the arithmetic, which then vectorises.
            decode(first_codes, first_map, self.first.absmax[index], m);
            decode(second_codes, second_map, self.second.absmax[index], v);
            for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(m.iter_mut()).zip(v.iter_mut()) {
                let (first, second) = (b1 * *m + d1 * g, b2 * *v + d2 * g * g);
                let keep = second.is_finite(); // false for every g that is not
                let updated = *p * decay - step_size * (first / (second.sqrt() + eps));
                (*m, *v) = if keep { (first, second) } else { (0.0, 0.0) };
                *p = if keep { updated } else { *p };
            }
            self.first.absmax[index] = largest_magnitude(m);
            self.second.absmax[index] = largest_magnitude(v);
            encode_block(m, first_map, self.first.absmax[index], first_codes);
            encode_block(v, second_map, self.second.absmax[index], second_codes);
        }
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        self.first.bytes() + self.second.bytes()
    }
}

fn decode(codes: &[u8], map: &Map, absmax: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = map.values[usize::from(*code)] * absmax;
    }
}

fn encode(values: &[f32], map: &Map, codes: &mut [u8], absmax: &mut [f32], block: usize) {
    for ((values, codes), absmax) in values.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        *absmax = largest_magnitude(values);
        encode_block(&mut values.to_vec(), map, *absmax, codes);
    }
}

/// Nearest codes, but not that of 0 for a negative value. Leaves the quotients in `values`.
fn encode_block(values: &mut [f32], map: &Map, absmax: f32, codes: &mut [u8]) {
    let zero = map.zero();
    if absmax == 0.0 {
        codes.fill(zero);
        return;
    }
    values.iter_mut().for_each(|value| *value /= absmax); // apart from the look-ups, so that it vectorises
    for (code, value) in codes.iter_mut().zip(values) {
        let nearest = map.nearest(*value);
        *code = nearest - u8::from(nearest == zero && *value < 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    const RULE: Adam8 = Adam8 { learning_rate: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step: 1 };

    #[test]
    fn the_first_step_is_that_of_adam_in_full_precision() {
        let gradient = [0.5f32, -0.25, 0.0, 2.0, -1e-3];
        let mut parameter = [1.0f32, -2.0, 3.0, 0.0, 0.5];
        let before = parameter;
        let mut moments = Moments8::zeros(5, 4);
        moments.step(&mut parameter, &gradient, RULE);
        for ((got, p), g) in parameter.iter().zip(before).zip(gradient) {
            let (p, g) = (f64::from(p), f64::from(g));
            let expected = p * (1.0 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8);
            assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} {expected}");
        }
        assert_eq!((moments.first.absmax.len(), moments.bytes()), (2, 26));
    }

    #[test]
    fn a_constant_gradient_leads_to_the_moments_of_adam_within_a_code() {
        let stream = Stream::new(5, "gradient");
        let gradient: Vec<f32> = (0..512).map(|i| stream.normal(i) as f32).collect();
        let mut parameter = vec![0.0; 512];
        let mut moments = Moments8::zeros(512, 256);
        for step in 1..=200 {
            moments.step(&mut parameter, &gradient, Adam8 { step, ..RULE });
        }
        let scale = (1.0 - 0.9f64.powi(200)) as f32;
        let expected: Vec<f32> = gradient.iter().map(|g| g * scale).collect();
        let expected = Blockwise8::quantise(&expected, Map::signed(), 256);
        let apart = moments.first.codes.iter().zip(&expected.codes).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(apart <= Some(1), "{apart:?}");
    }

    #[test]
    fn signs_are_kept_and_non_finite_gradients_change_nothing() {
        let mut moments = Moments8::zeros(4, 4);
        let mut parameter = [1.0; 4];
        let rule = Adam8 { weight_decay: 0.0, ..RULE };
        moments.step(&mut parameter, &[1.0, -1e-9, 1e-9, f32::NAN], rule);
        let first = moments.first.dequantise(Map::signed());
        assert!(first[0] > 0.0 && first[1] < 0.0 && first[2] >= 0.0);
        assert_eq!((first[3], parameter[3]), (0.0, 1.0));
        let before = parameter;
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30] {
            moments.step(&mut parameter, &[bad; 4], Adam8 { step: 2, ..rule });
            assert_eq!(parameter, before);
            assert!(moments.first.dequantise(Map::signed()).iter().all(|value| *value == 0.0));
        }
    }

    #[test]
    fn without_gradient_the_parameter_only_decays() {
        let mut moments = Moments8::zeros(3, 256);
        let mut parameter = [1.0, -1.0, 0.5];
        moments.step(&mut parameter, &[0.0; 3], RULE);
        assert_eq!(parameter, [0.999, -0.999, 0.4995]);
        assert_eq!(moments, Moments8::zeros(3, 256));
    }
}
