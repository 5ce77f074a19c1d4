import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card } from '@/components/Page';
import type { Job } from '@/types/api';
import { Button, Text } from '@mantine/core';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { downloadReport, reportQuery } from './queries';

/** What the run has written about itself; nothing for runs of before there were reports. */
export function ReportCard({ job }: { job: Job }) {
  const { t } = useTranslation();
  const report = useQuery(reportQuery(job.id)).data;
  const fetching = useMutation({ mutationFn: () => downloadReport(job.id) });
  if (!report) return null;
  return (
    <Card title={t('run.report')}>
      <Text size="sm" c="dimmed">
        {t('run.reportText')}
      </Text>
      {fetching.error ? <ErrorNote error={fetching.error} retry={() => fetching.mutate()} /> : null}
      <Button
        variant="default"
        leftSection={<Icon name="download" size={16} />}
        loading={fetching.isPending}
        onClick={() => fetching.mutate()}
        style={{ alignSelf: 'flex-start' }}
      >
        {t('run.reportDownload')}
      </Button>
    </Card>
  );
}
