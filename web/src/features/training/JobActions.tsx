import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import type { DataKind, Job } from '@/types/api';
import { Button, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { useNavigate } from 'react-router';
import { cancelJob, pauseJob, resumeJob, resumeSlower } from './queries';

interface PauseProps {
  goesOn: boolean; // it is paused, or about to be: then the opposite is offered
  act: () => Promise<unknown>;
}

export function Pause({ goesOn, act }: PauseProps) {
  const { t } = useTranslation();
  const changing = useMutation({ mutationFn: act });
  return (
    <>
      {changing.error ? <ErrorNote error={changing.error} /> : null}
      <Button variant="default" loading={changing.isPending} onClick={() => changing.mutate()}>
        {t(goesOn ? 'job.resume' : 'job.pause')}
      </Button>
    </>
  );
}

/** The stream tells what comes of it. */
export function PauseJob({ job }: { job: Job }) {
  const goesOn = job.pausing || job.status === 'paused';
  return <Pause goesOn={goesOn} act={() => (goesOn ? resumeJob(job.id) : pauseJob(job.id))} />;
}

interface CancelProps {
  open: string;
  title: string;
  text: string;
  act: () => Promise<unknown>;
}

export function Cancel({ open, title, text, act }: CancelProps) {
  const { t } = useTranslation();
  const [opened, modal] = useDisclosure(false);
  return (
    <>
      <Button variant="default" onClick={modal.open}>
        {open}
      </Button>
      <Dialog opened={opened} onClose={modal.close} title={title}>
        <Confirm yes={t('job.cancelYes')} no={t('job.cancelNo')} act={act} onDone={modal.close}>
          <Text size="sm">{text}</Text>
        </Confirm>
      </Dialog>
    </>
  );
}

export function CancelJob({ job, kind }: { job: Job; kind: DataKind }) {
  const { t } = useTranslation();
  return (
    <Cancel
      open={t('job.cancel')}
      title={t('job.cancelTitle')}
      text={t(kind === 'pictures' ? 'pictured.cancelText' : 'job.cancelText')}
      act={() => cancelJob(job.id)}
    />
  );
}

/** Where the training has diverged; without a checkpoint the relay says that there is none. */
export function Slower({ job }: { job: Job }) {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const going = useMutation({ mutationFn: resumeSlower, onSuccess: () => navigate(0) }); // its stream had ended
  if (job.error?.code !== 'training_diverged') return null;
  return (
    <>
      {going.error ? <ErrorNote error={going.error} /> : null}
      <Button variant="default" loading={going.isPending} onClick={() => going.mutate(job.id)}>
        {t('job.slower')}
      </Button>
    </>
  );
}

export function Again({ job }: { job: Job }) {
  const { t } = useTranslation();
  const navigate = useNavigate();
  return (
    <Button
      variant="default"
      leftSection={<Icon name="retry" />}
      onClick={() => void navigate('/training/new', { state: { again: job } })}
    >
      {t('job.again')}
    </Button>
  );
}
