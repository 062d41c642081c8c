//! Names and shapes of a family's tensors in a Hugging Face checkpoint.

use super::DecoderConfig;

/// The linear maps of one block, in model order, relative to `model.layers.<n>.`.
const LINEAR: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl DecoderConfig {
    /// Every tensor that a checkpoint of this model holds, in model order: Hugging Face name and shape. Weights of linear
    /// maps are `[out, in]` on disk.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_layers {
            self.add_block(&format!("model.layers.{layer}"), &mut tensors);
        }
        tensors.push(("model.norm.weight".to_string(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_string(), vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    /// Whether a tensor that is in a file but not among the expected ones may be passed over: the buffers of rotary
    /// frequencies that old checkpoints store, and a copy of the embedding as head where the two are tied.
    pub fn is_ignorable(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq") || (self.tie_word_embeddings && name == "lm_head.weight")
    }

    /// Module names of all linear maps inside the blocks, in model order (`model.layers.0.self_attn.q_proj`, ...). The head
    /// is not among them: "all-linear" targets leave it out.
    pub fn linear_modules(&self) -> Vec<String> {
        let block = |layer| LINEAR.iter().map(move |module| format!("model.layers.{layer}.{module}"));
        (0..self.num_layers).flat_map(block).collect()
    }

    fn add_block(&self, block: &str, tensors: &mut Vec<(String, Vec<usize>)>) {
        let mut add = |name: &str, shape: &[usize]| tensors.push((format!("{block}.{name}"), shape.to_vec()));
        let hidden = self.hidden_size;
        add("input_layernorm.weight", &[hidden]);
        for module in LINEAR {
            let (d_in, d_out, has_bias) = self.linear_shape(module);
            add(&format!("{module}.weight"), &[d_out, d_in]);
            if has_bias {
                add(&format!("{module}.bias"), &[d_out]);
            }
            if self.qk_norm && (module.ends_with("q_proj") || module.ends_with("k_proj")) {
                add(&format!("{}.weight", module.replace("proj", "norm")), &[self.head_dim]);
            }
            if module.ends_with("o_proj") {
                add("post_attention_layernorm.weight", &[hidden]);
                if self.sandwich_norms {
                    add("pre_feedforward_layernorm.weight", &[hidden]);
                }
            }
        }
        if self.sandwich_norms {
            add("post_feedforward_layernorm.weight", &[hidden]);
        }
    }

    /// Input width, output width and whether there is a bias.
    fn linear_shape(&self, module: &str) -> (usize, usize, bool) {
        let (hidden, queries, keys) =
            (self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match module {
            "self_attn.q_proj" => (hidden, queries, self.qkv_bias),
            "self_attn.k_proj" | "self_attn.v_proj" => (hidden, keys, self.qkv_bias),
            "self_attn.o_proj" => (queries, hidden, self.o_bias),
            "mlp.down_proj" => (self.intermediate_size, hidden, self.mlp_bias),
            _ => (hidden, self.intermediate_size, self.mlp_bias),
        }
    }
}
