//! The tape without values: which buffers each operation keeps for its backward step, and when that step lets go of them.
//!
//! Steps run by depth, deepest first, as Burn's do, and each frees what it kept when it has run. A gradient that arrives at a
//! node that has one is added in place.

use std::collections::{BTreeMap, BTreeSet};

use super::ledger::{Buffer, Category, Ledger};

/// A node of the tape.
pub type NodeId = usize;

/// A tensor: its memory, and its place on the tape where a gradient flows to it.
#[derive(Clone, Debug)]
pub struct Value {
    /// Its memory.
    pub buffer: Buffer,
    /// Its node; none for a constant.
    pub node: Option<NodeId>,
}

impl Value {
    /// A tensor that is not differentiated.
    pub fn constant(buffer: Buffer) -> Self {
        Self { buffer, node: None }
    }
}

/// Gets the gradient of the operation's result, hands on those of its operands.
type Backward = Box<dyn FnOnce(Buffer, &mut Gradients)>;

struct Node {
    depth: usize,
    parents: Vec<NodeId>,
    /// None for a leaf.
    backward: Option<Backward>,
}

/// The operations of one segment.
pub struct Tape {
    ledger: Ledger,
    nodes: Vec<Node>,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tape of {} nodes", self.nodes.len())
    }
}

impl Tape {
    /// An empty tape.
    pub fn new(ledger: &Ledger) -> Self {
        Self { ledger: ledger.clone(), nodes: vec![] }
    }

    /// A tensor whose gradient is wanted.
    pub fn leaf(&mut self, buffer: Buffer) -> Value {
        self.nodes.push(Node { depth: 0, parents: vec![], backward: None });
        Value { buffer, node: Some(self.nodes.len() - 1) }
    }

    /// The result of an operation. `backward`, with all it holds, is dropped where no operand is on the tape.
    pub fn operation(
        &mut self,
        operands: &[Option<NodeId>],
        result: Buffer,
        backward: impl FnOnce(Buffer, &mut Gradients) + 'static,
    ) -> Value {
        let parents: Vec<NodeId> = operands.iter().copied().flatten().collect();
        if parents.is_empty() {
            return Value::constant(result);
        }
        let depth = 1 + parents.iter().map(|&parent| self.nodes[parent].depth).max().unwrap_or(0);
        self.nodes.push(Node { depth, parents, backward: Some(Box::new(backward)) });
        Value { buffer: result, node: Some(self.nodes.len() - 1) }
    }

    /// The gradients of all leaves that `root` depends on, given its own.
    pub fn backward(mut self, root: NodeId, gradient: Buffer) -> Gradients {
        let mut gradients = Gradients { ledger: self.ledger.clone(), of: BTreeMap::from([(root, gradient)]) };
        let mut order = self.reached_from(root);
        order.sort_by_key(|&node| std::cmp::Reverse(self.nodes[node].depth)); // stable: as reached within a depth
        for node in order {
            if let Some(backward) = self.nodes[node].backward.take()
                && let Some(gradient) = gradients.of.remove(&node)
            {
                backward(gradient, &mut gradients);
            }
        }
        gradients
    }

    /// Every node that `root` depends on, the last operand of an operation first.
    fn reached_from(&self, root: NodeId) -> Vec<NodeId> {
        let (mut found, mut seen, mut open) = (vec![], BTreeSet::new(), vec![root]);
        while let Some(node) = open.pop() {
            if seen.insert(node) {
                found.push(node);
                open.extend(&self.nodes[node].parents);
            }
        }
        found
    }
}

/// Gradients by node.
#[derive(Debug)]
pub struct Gradients {
    ledger: Ledger,
    of: BTreeMap<NodeId, Buffer>,
}

impl Gradients {
    /// Adds a gradient to that of a node, if it has a node.
    pub fn register(&mut self, node: Option<NodeId>, gradient: Buffer) {
        let Some(node) = node else { return };
        let sum = match self.of.remove(&node) {
            Some(old) => sum(&self.ledger, gradient, old),
            None => gradient,
        };
        self.of.insert(node, sum);
    }

    /// Takes the gradient of a leaf out.
    pub fn remove(&mut self, value: &Value) -> Option<Buffer> {
        self.of.remove(&value.node?)
    }
}

/// `a + b`, in the memory of an operand that nothing else holds, a first.
pub fn sum(ledger: &Ledger, a: Buffer, b: Buffer) -> Buffer {
    match (a.is_unique(), b.is_unique()) {
        (true, _) => a,
        (false, true) => b,
        (false, false) => ledger.take(Category::Workspace, a.bytes()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `y = f(x) + x`, where f keeps x and its result.
    #[test]
    fn a_step_frees_what_it_kept_and_gradients_add_up_in_place() {
        let ledger = Ledger::default();
        let mut tape = Tape::new(&ledger);
        let x = tape.leaf(ledger.take(Category::Activations, 10));
        let inner = ledger.take(Category::Activations, 10);
        let (kept, book, node) = ((x.buffer.clone(), inner.clone()), ledger.clone(), x.node);
        let inner = tape.operation(&[x.node], inner, move |dy, gradients| {
            let dx = book.take(Category::Workspace, 10);
            drop((dy, kept));
            gradients.register(node, dx);
        });
        let operands = [x.node, inner.node];
        let result = sum(&ledger, x.buffer.clone(), inner.buffer); // both are held elsewhere
        let y = tape.operation(&operands, result, move |dy, gradients| {
            gradients.register(operands[0], dy.clone());
            gradients.register(operands[1], dy);
        });
        let seed = ledger.take(Category::Workspace, 10);
        let root = y.node.unwrap();
        drop(y);
        assert_eq!(ledger.live()[Category::Activations as usize], 20);
        let mut gradients = tape.backward(root, seed);
        assert_eq!(ledger.live()[Category::Activations as usize], 10, "x alone");
        assert_eq!(ledger.live()[Category::Workspace as usize], 10, "one gradient");
        assert!(gradients.remove(&x).unwrap().is_unique());
        assert_eq!(ledger.peak().0.iter().sum::<u64>(), 40);
    }

    #[test]
    fn constants_keep_nothing() {
        let ledger = Ledger::default();
        let mut tape = Tape::new(&ledger);
        let kept = ledger.take(Category::Activations, 10);
        let y = tape.operation(&[None], ledger.take(Category::Activations, 5), move |_, _| drop(kept));
        assert!(y.node.is_none());
        assert_eq!(ledger.live()[Category::Activations as usize], 5);
    }
}
