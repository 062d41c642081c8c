use crate::packed::{Format, Layout, Order};
use crate::route::{Packed, Product, packed, product};

#[test]
fn thin_products_go_to_their_kernel() {
    let cases = [
        ((4096, 16, false), Product::Thin),
        ((16, 4096, false), Product::Thin),
        ((4096, 32, false), Product::Thin),
        ((4096, 33, false), Product::Matmul),
        ((4096, 4096, false), Product::Matmul),
        ((4096, 1, false), Product::Matmul),
        ((4096, 16, true), Product::Matmul),
    ];
    for ((m, n, is_sum), want) in cases {
        assert_eq!(product(m, n, is_sum), want, "[{m}, {n}], {is_sum}");
    }
}

#[test]
fn few_tokens_are_multiplied_by_codes_where_rows_are_whole_words() {
    let cases = [
        (Format::Nf4, 64, 8, Packed::Codes),
        (Format::Nf4, 64, 9, Packed::Panels),
        (Format::Nf4, 60, 8, Packed::Panels),
        (Format::Int8, 60, 8, Packed::Codes),
        (Format::Int8, 62, 8, Packed::Panels),
    ];
    for (format, d_in, tokens, want) in cases {
        let layout = Layout { format, block: 64, dims: [d_in, 3], order: Order::Outputs, nested: None };
        assert_eq!(packed(tokens, &layout), want, "{format:?} {d_in} {tokens}");
    }
}
