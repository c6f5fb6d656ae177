//! Samples of what guests use, from heartbeats. In memory only: the store never sees them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use oblak_model::wire::Usage;
use uuid::Uuid;

/// Samples kept of each guest.
const SAMPLES: usize = 30;
/// Guests with samples; beyond, the one that was heard of least recently is forgotten.
const GUESTS: usize = 50_000;

/// A ring of samples for each guest.
#[derive(Default)]
pub(crate) struct UsageRings(Mutex<HashMap<Uuid, VecDeque<Usage>>>);

impl UsageRings {
    pub fn add(&self, instance: Uuid, usage: Usage) {
        let mut rings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rings.len() >= GUESTS && !rings.contains_key(&instance) {
            let oldest = rings.iter().min_by_key(|(_, ring)| ring.back().map(|u| u.at)).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                rings.remove(&oldest);
            }
        }
        let ring = rings.entry(instance).or_default();
        if ring.len() >= SAMPLES {
            ring.pop_front();
        }
        ring.push_back(usage);
    }

    pub fn latest(&self, instance: Uuid) -> Option<Usage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&instance)?.back().cloned()
    }

    /// All samples, oldest first.
    pub fn all(&self, instance: Uuid) -> Vec<Usage> {
        let rings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rings.get(&instance).map(|ring| ring.iter().cloned().collect()).unwrap_or_default()
    }

    pub fn forget(&self, instance: Uuid) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&instance);
    }
}
