//! Which processes of a former worker this one watches: those that are recorded, each by a pidfd that the keeper has.
//!
//! A process that comes again under another name is taken over in two steps, by the core in the records and by the door at the keeper,
//! and the worker may die between them:
//!
//! ```text
//! records            keeper       what follows
//! former             former, new  the new name is forgotten: its Join was never done
//! new (of former)    former, new  the former one is forgotten
//! new (of former)    former       watched by the former one's pidfd, which is the same process's
//! name               (neither)    died with its Join half done, and was granted nothing: the core is told that it is gone
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

use tender_proto::descriptors::Process;

use crate::keeper::KeptMember;
use crate::names::{AttachmentId, TenantId};
use crate::request::door::FormerMember;

/// A process that is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// Its name.
    pub attachment: AttachmentId,
    /// Whose it is.
    pub tenant: TenantId,
    /// The one whose place it took.
    pub former: Option<AttachmentId>,
}

/// What is to be done about the processes from before.
#[derive(Debug, Default)]
pub struct Survey {
    /// These are watched.
    pub members: Vec<FormerMember>,
    /// Of these, the keeper knows under their former names only.
    pub renamed: Vec<AttachmentId>,
    /// The keeper is to forget these.
    pub forgotten: Vec<AttachmentId>,
    /// Nobody can watch these.
    pub unwatched: Vec<AttachmentId>,
}

/// Brings together what is recorded and what the keeper has. An error is for want of descriptors: nobody is taken for dead because of it.
pub fn survey(recorded: &[Recorded], kept: Vec<KeptMember>) -> io::Result<Survey> {
    let mut survey = Survey::default();
    let (mut watched, mut not_kept) = (BTreeMap::new(), Vec::new());
    let mut processes: BTreeMap<_, _> = kept.into_iter().map(|member| (member.attachment, member.process)).collect();
    for &Recorded { attachment, tenant, former } in recorded {
        match processes.remove(&attachment) {
            Some(process) => {
                watched.insert(attachment, survey.members.len());
                survey.members.push(FormerMember { attachment, tenant, former, process });
            }
            None => not_kept.push(Recorded { attachment, tenant, former }),
        }
    }
    for Recorded { attachment, tenant, former } in not_kept {
        let found = former.and_then(|former| {
            let recorded = watched.get(&former).map(|at: &usize| &survey.members[*at].process);
            recorded.or_else(|| processes.get(&former))
        });
        match found {
            Some(process) => {
                let process = Process::from_fd(process.as_fd().try_clone_to_owned()?)?;
                survey.members.push(FormerMember { attachment, tenant, former, process });
                survey.renamed.push(attachment);
            }
            None => survey.unwatched.push(attachment),
        }
    }
    survey.forgotten = processes.into_keys().collect();
    Ok(survey)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMER: AttachmentId = AttachmentId(7);
    const NEW: AttachmentId = AttachmentId(9);

    fn recorded(attachment: AttachmentId, former: Option<AttachmentId>) -> Recorded {
        Recorded { attachment, tenant: TenantId(1), former }
    }

    fn kept(attachment: AttachmentId) -> KeptMember {
        KeptMember { attachment, tenant: TenantId(1), process: Process::open_self().unwrap() }
    }

    /// Watched, renamed, forgotten, unwatched.
    fn names(survey: &Survey) -> [Vec<AttachmentId>; 4] {
        let watched = survey.members.iter().map(|member| member.attachment).collect();
        [watched, survey.renamed.clone(), survey.forgotten.clone(), survey.unwatched.clone()]
    }

    #[test]
    fn a_process_is_watched_wherever_the_worker_died_while_it_came_again() {
        let (none, new) = (Vec::new, recorded(NEW, Some(FORMER)));
        let before = survey(&[recorded(FORMER, None)], vec![kept(FORMER), kept(NEW)]).unwrap();
        assert_eq!(names(&before), [vec![FORMER], none(), vec![NEW], none()]);
        let between = survey(&[new], vec![kept(FORMER), kept(NEW)]).unwrap();
        assert_eq!(names(&between), [vec![NEW], none(), vec![FORMER], none()]);
        let after = survey(&[new], vec![kept(NEW)]).unwrap();
        assert_eq!(names(&after), [vec![NEW], none(), none(), none()]);
        let not_kept = survey(&[new], vec![kept(FORMER)]).unwrap();
        assert_eq!(names(&not_kept), [vec![NEW], vec![NEW], vec![FORMER], none()]);
        assert_eq!(not_kept.members[0].former, Some(FORMER));
        assert!(!not_kept.members[0].process.is_dead());
    }

    #[test]
    fn who_was_never_kept_is_gone() {
        let survey = survey(&[recorded(NEW, None), recorded(AttachmentId(11), Some(FORMER))], Vec::new()).unwrap();
        assert_eq!(names(&survey), [vec![], vec![], vec![], vec![NEW, AttachmentId(11)]]);
    }
}
