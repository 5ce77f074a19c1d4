import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Page } from '@/components/Page';
import { ago, duration } from '@/lib/format';
import type { Job } from '@/types/api';
import { Button, Skeleton, Text } from '@mantine/core';
import { useInfiniteQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import css from './JobsPage.module.css';
import { methodWords } from './LayersForm';
import { LayerStrip } from './LayerStrip';
import { jobsQuery } from './queries';
import { StatusBadge } from './StatusBadge';

export function JobsPage() {
  const { t } = useTranslation();
  const jobs = useInfiniteQuery(jobsQuery);
  const rows = jobs.data?.pages.flatMap((page) => page.data) ?? [];
  const fresh = (
    <Button component={Link} to="/training/new" leftSection={<Icon name="plus" />}>
      {t('training.new')}
    </Button>
  );
  return (
    <Page
      title={t('training.title')}
      lead={t('training.lead')}
      actions={
        <>
          <Button component={Link} to="/training/models" variant="default" leftSection={<Icon name="layers" />}>
            {t('models.title')}
          </Button>
          {rows.length > 0 ? fresh : null}
        </>
      }
    >
      {jobs.isError && rows.length === 0 ? <ErrorNote error={jobs.error} retry={() => void jobs.refetch()} /> : null}
      {jobs.isPending ? (
        <div role="status">
          <Text c="dimmed">{t('app.loading', { what: t('training.jobs') })}</Text>
          <Skeleton height={72} mt="sm" radius="md" />
        </div>
      ) : null}
      {jobs.isSuccess && rows.length === 0 ? (
        <Empty
          title={t('training.none')}
          text={t('training.noneText')}
          picture={<LayerStrip n={18} chosen={(i) => i > 12} />}
        >
          {fresh}
        </Empty>
      ) : null}
      {rows.length > 0 ? (
        <ul className={css.list} aria-label={t('training.jobs')}>
          {rows.map((job) => (
            <JobRow key={job.id} job={job} />
          ))}
        </ul>
      ) : null}
      {jobs.hasNextPage ? (
        <Button variant="subtle" mt="md" loading={jobs.isFetchingNextPage} onClick={() => void jobs.fetchNextPage()}>
          {t('training.more')}
        </Button>
      ) : null}
    </Page>
  );
}

function JobRow({ job }: { job: Job }) {
  const { t, i18n } = useTranslation();
  const took = job.finished_at === null ? null : duration(job.finished_at - job.created_at, i18n.language);
  return (
    <li>
      <Link to={`/training/${job.id}`} className={css.row}>
        <span className={css.name}>{job.user_provided_suffix ?? t('job.untitled')}</span>
        <StatusBadge job={job} />
        <span className={css.more}>
          {[
            t('training.onModel', { model: job.model.split('/').at(-1) }),
            job.layers.map((spec) => `${t(methodWords(spec.method))} ${spec.layers}`).join(' + '),
            t('training.created', { ago: ago(job.created_at, i18n.language) }),
            took ? t('job.took', { time: took }) : null,
          ]
            .filter(Boolean)
            .join(' · ')}
        </span>
      </Link>
    </li>
  );
}
