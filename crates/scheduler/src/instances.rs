//! What is placed where, in a few bytes per instance.
//!
//! Instances of one flavor and group are alike, so resources and labels are stored once per *shape* and an instance is
//! its id, a node and a shape: 24 bytes.

use std::hash::{Hash, Hasher};

use crate::amount::Resources;
use crate::hash::FastMap;
use crate::ids::InstanceId;

/// 128 bits without the 16 byte alignment of `u128`, which would cost 8 bytes per entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packed([u32; 4]);

impl Packed {
    fn new(id: InstanceId) -> Self {
        Self([(id.0 >> 96) as u32, (id.0 >> 64) as u32, (id.0 >> 32) as u32, id.0 as u32])
    }

    fn id(self) -> InstanceId {
        InstanceId(self.0.iter().fold(0, |id, word| id << 32 | u128::from(*word)))
    }
}

impl Hash for Packed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(self.id().0);
    }
}

/// Where an instance is and what it is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) node: u32,
    pub(crate) shape: u32,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) resources: Resources,
    pub(crate) group: u32,
    users: u32,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Instances {
    placed: FastMap<Packed, Placed>,
    shapes: Vec<Shape>,
    vacant: Vec<u32>,
    by_content: FastMap<(Resources, u32), u32>,
}

impl Instances {
    pub(crate) fn len(&self) -> usize {
        self.placed.len()
    }

    pub(crate) fn get(&self, id: InstanceId) -> Option<Placed> {
        self.placed.get(&Packed::new(id)).copied()
    }

    pub(crate) fn shape(&self, shape: u32) -> &Shape {
        &self.shapes[shape as usize]
    }

    /// Records an instance. True when its shape is new, that is, when it became a user of `group`.
    pub(crate) fn insert(&mut self, id: InstanceId, node: u32, resources: Resources, group: u32) -> bool {
        let known = self.by_content.get(&(resources, group)).copied();
        let shape = known.unwrap_or_else(|| {
            let fresh = Shape { resources, group, users: 0 };
            let at = match self.vacant.pop() {
                Some(at) => {
                    self.shapes[at as usize] = fresh;
                    at
                }
                None => {
                    self.shapes.push(fresh);
                    (self.shapes.len() - 1) as u32
                }
            };
            self.by_content.insert((resources, group), at);
            at
        });
        self.shapes[shape as usize].users += 1;
        self.placed.insert(Packed::new(id), Placed { node, shape });
        known.is_none()
    }

    /// Forgets an instance. True when its shape went with it, that is, when `group` lost a user.
    pub(crate) fn remove(&mut self, id: InstanceId) -> Option<(Placed, Shape, bool)> {
        let placed = self.placed.remove(&Packed::new(id))?;
        let shape = &mut self.shapes[placed.shape as usize];
        shape.users -= 1;
        let copy = *shape;
        let last = copy.users == 0;
        if last {
            self.by_content.remove(&(copy.resources, copy.group));
            self.vacant.push(placed.shape);
        }
        Some((placed, copy, last))
    }

    /// In no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (InstanceId, Placed)> {
        self.placed.iter().map(|(id, placed)| (id.id(), *placed))
    }
}
