//! A transformer block on the tape, in the order of [`lowrank_models::block`].

use super::layers::Segment;
use super::model::{Block, Linear, Parameter};
use super::tape::Value;

impl Segment<'_> {
    /// A transformer block on the residual stream; `sizes` are query heads, key heads, width of a head, inner width.
    pub fn block(&mut self, x: Value, block: &Block, [h, g, d, inner]: [usize; 4]) -> Value {
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = block.linears.as_slice() else {
            unreachable!("a decoder's block has seven linear layers")
        };
        let t = self.shape.tokens();
        let mut norms = block.norms.iter();
        let normed = self.normed(x.clone(), norms.next());
        let [q_norm, k_norm] = [0, 1].map(|side| block.head_norms.as_ref().map(|norms| &norms[side]));
        let q = self.rotated(normed.clone(), q_proj, q_norm, t * h * d);
        let k = self.rotated(normed.clone(), k_proj, k_norm, t * g * d);
        let v = self.linear(normed, v_proj, t);
        let attended = self.at.attention(&mut self.tape, [q, k, v], self.shape, [h, g, d]);
        let attended = self.linear(attended, o_proj, t);
        let has_sandwich = block.norms.len() == 4;
        let attended = if has_sandwich { self.normed(attended, norms.next()) } else { attended };
        let x = self.at.add(&mut self.tape, x, attended);
        let normed = self.normed(x.clone(), norms.next());
        let gate = self.linear(normed.clone(), gate_proj, t);
        let up = self.linear(normed, up_proj, t);
        let product = self.at.gated(&mut self.tape, gate, up, t * inner);
        let out = self.linear(product, down_proj, t);
        let out = if has_sandwich { self.normed(out, norms.next()) } else { out };
        self.at.add(&mut self.tape, x, out)
    }

    fn rotated(&mut self, x: Value, layer: &Linear, norm: Option<&Parameter>, values: usize) -> Value {
        let projected = self.linear(x, layer, self.shape.tokens());
        let normed = match norm {
            Some(norm) => {
                let gamma = self.parameter(norm);
                self.at.rms_norm(&mut self.tape, projected, &gamma, values)
            }
            None => projected,
        };
        self.at.rotary(&mut self.tape, normed, values)
    }

    fn normed(&mut self, x: Value, gamma: Option<&Parameter>) -> Value {
        let Some(gamma) = gamma else { return x };
        let values = self.shape.tokens() * gamma.values();
        let gamma = self.parameter(gamma);
        self.at.rms_norm(&mut self.tape, x, &gamma, values)
    }
}
