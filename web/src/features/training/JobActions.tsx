import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import type { Job } from '@/types/api';
import { Button, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { useNavigate } from 'react-router';
import { cancelJob, pauseJob, resumeJob, resumeSlower } from './queries';

/** Or its opposite. The stream tells what comes of it. */
export function Pause({ job }: { job: Job }) {
  const { t } = useTranslation();
  const goesOn = job.pausing || job.status === 'paused';
  const changing = useMutation({ mutationFn: goesOn ? resumeJob : pauseJob });
  return (
    <>
      {changing.error ? <ErrorNote error={changing.error} /> : null}
      <Button variant="default" loading={changing.isPending} onClick={() => changing.mutate(job.id)}>
        {t(goesOn ? 'job.resume' : 'job.pause')}
      </Button>
    </>
  );
}

export function Cancel({ job }: { job: Job }) {
  const { t } = useTranslation();
  const [opened, modal] = useDisclosure(false);
  return (
    <>
      <Button variant="default" onClick={modal.open}>
        {t('job.cancel')}
      </Button>
      <Dialog opened={opened} onClose={modal.close} title={t('job.cancelTitle')}>
        <Confirm yes={t('job.cancelYes')} no={t('job.cancelNo')} act={() => cancelJob(job.id)} onDone={modal.close}>
          <Text size="sm">{t('job.cancelText')}</Text>
        </Confirm>
      </Dialog>
    </>
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
