//! Who holds what: every reservation and every lease has a name of its own, good once. Giving one back a second time, or under a name
//! that was guessed, does nothing; so does giving back another group's, or, by the ring, what a stream of the own group still copies.

use crate::limits;
use crate::names::{AttachmentId, By, Hold, Holder, SlotId};

/// What a hold gives the right to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// To fill the slot.
    Reservation,
    /// To read it.
    Lease,
}

/// A reservation or a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The slot.
    pub slot: SlotId,
    /// To do what with it.
    pub right: Right,
    /// Whose.
    pub holder: Holder,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    generation: u32,
    grant: Option<Grant>,
}

/// All reservations and leases.
#[derive(Debug, Default)]
pub struct Grants {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Grants {
    /// Names a grant; `None` when there are too many.
    pub fn grant(&mut self, grant: Grant) -> Option<Hold> {
        let place = match self.free.pop() {
            Some(place) => place,
            None if self.entries.len() < limits::GRANTS_MAX => {
                self.entries.push(Entry { generation: 0, grant: None });
                self.entries.len() as u32 - 1
            }
            None => return None,
        };
        let entry = &mut self.entries[place as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.grant = Some(grant);
        Some(Hold { place, generation: entry.generation })
    }

    /// A place as it was before a restart: its name does not come again. `None` for what has ended. [`Grants::reopen`] follows.
    pub fn restore(&mut self, hold: Hold, grant: Option<Grant>) {
        let place = hold.place as usize;
        if self.entries.len() <= place {
            self.entries.resize(place + 1, Entry { generation: 0, grant: None });
        }
        self.entries[place] = Entry { generation: hold.generation, grant };
    }

    /// Everything is restored: the places of what has ended may be used again.
    pub fn reopen(&mut self) {
        let places = (0..self.entries.len() as u32).rev();
        self.free = places.filter(|&place| self.entries[place as usize].grant.is_none()).collect();
    }

    /// Another member of the group has a hold from now on.
    pub fn hand_over(&mut self, hold: Hold, attachment: AttachmentId) {
        if let Some(entry) = self.entries.get_mut(hold.place as usize)
            && entry.generation == hold.generation
            && let Some(grant) = &mut entry.grant
        {
            grant.holder.attachment = attachment;
        }
    }

    /// Whether so many more would fit.
    pub fn has_room(&self, count: usize) -> bool {
        self.free.len() + limits::GRANTS_MAX - self.entries.len() >= count
    }

    /// What a hold stands for, to whoever may end it.
    pub fn get(&self, hold: Hold, by: By) -> Option<Grant> {
        let entry = self.entries.get(hold.place as usize).filter(|entry| entry.generation == hold.generation)?;
        entry.grant.filter(|grant| match by {
            By::Daemon => true,
            By::Group(group, door) => (grant.holder.group, grant.holder.door) == (group, door),
        })
    }

    /// Ends a hold. `None` if it was ended before, or is not theirs.
    pub fn end(&mut self, hold: Hold, right: Right, by: By) -> Option<Grant> {
        let grant = self.get(hold, by).filter(|grant| grant.right == right)?;
        self.entries[hold.place as usize].grant = None;
        self.free.push(hold.place);
        Some(grant)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (Hold, Grant)> {
        let named = |(entry, place): (&Entry, u32)| {
            entry.grant.map(|grant| (Hold { place, generation: entry.generation }, grant))
        };
        self.entries.iter().zip(0u32..).filter_map(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{Door, GroupId};

    fn grant(group: u32, right: Right) -> Grant {
        let holder = Holder { group: GroupId(group), attachment: AttachmentId(7), door: Door::Stream };
        Grant { slot: SlotId::new(1, 2), right, holder }
    }

    #[test]
    fn a_hold_ends_once() {
        let mut grants = Grants::default();
        let hold = grants.grant(grant(1, Right::Lease)).unwrap();
        assert!(grants.end(hold, Right::Lease, By::Daemon).is_some());
        assert_eq!(grants.end(hold, Right::Lease, By::Daemon), None);
        let next = grants.grant(grant(1, Right::Lease)).unwrap();
        assert_eq!(next.place, hold.place, "places are used again");
        assert_eq!(grants.end(hold, Right::Lease, By::Daemon), None, "under another name");
        assert_eq!(grants.count(), 1);
    }

    #[test]
    fn a_hold_is_ended_by_its_own_group_and_for_what_it_is() {
        let mut grants = Grants::default();
        let hold = grants.grant(grant(1, Right::Reservation)).unwrap();
        assert_eq!(grants.end(hold, Right::Reservation, By::Group(GroupId(2), Door::Stream)), None);
        assert_eq!(grants.end(hold, Right::Lease, By::Group(GroupId(1), Door::Stream)), None);
        assert!(grants.end(hold, Right::Reservation, By::Group(GroupId(1), Door::Stream)).is_some());
        assert_eq!(grants.all().count(), 0);
    }

    #[test]
    fn a_hold_is_ended_by_the_door_that_it_was_granted_by() {
        let mut grants = Grants::default();
        let hold = grants.grant(grant(1, Right::Lease)).unwrap();
        assert_eq!(grants.end(hold, Right::Lease, By::Group(GroupId(1), Door::Ring)), None);
        assert!(grants.end(hold, Right::Lease, By::Group(GroupId(1), Door::Stream)).is_some());
    }
}
