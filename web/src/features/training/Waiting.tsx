import type { Job } from '@/types/api';
import { Anchor, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';

/** Why a queued job has not begun, and what would help. */
export function Waiting({ job }: { job: Pick<Job, 'model' | 'waiting_for'> }) {
  const { t, i18n } = useTranslation();
  const model = job.model.split('/').at(-1);
  const key = `job.waiting_${job.waiting_for?.reason}`;
  const known = i18n.exists(key);
  return (
    <Text>
      {known ? t(key as 'job.waiting_no_gpu', { model }) : t('job.waiting', { model })}{' '}
      {job.waiting_for?.reason === 'no_gpu' || job.waiting_for?.reason === 'model_not_offered' ? (
        <Anchor component={Link} to="/gpus">
          {t('generate.connect')}
        </Anchor>
      ) : null}
    </Text>
  );
}
