import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { Page } from '@/components/Page';
import { meQuery } from '@/features/session/queries';
import { Button, Skeleton, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import { Connect } from './Connect';
import { GpuCard } from './GpuCard';
import css from './GpusPage.module.css';
import { gpusQuery } from './queries';

export function GpusPage() {
  const { t } = useTranslation();
  const gpus = useQuery(gpusQuery);
  const admin = useQuery(meQuery).data?.admin === true;
  const [asked, setAsked] = useState(false);
  const here = gpus.data?.filter((gpu) => gpu.alive) ?? [];
  const gone = gpus.data?.filter((gpu) => !gpu.alive) ?? [];
  const none = gpus.isSuccess && here.length === 0;
  return (
    <Page
      title={t('gpus.title')}
      lead={t('gpus.lead')}
      actions={
        <>
          {admin ? (
            <Button component={Link} to="/gpus/tokens" variant="default" leftSection={<Icon name="key" />}>
              {t('tokens.title')}
            </Button>
          ) : null}
          {asked || none || !gpus.isSuccess ? null : (
            <Button leftSection={<Icon name="plus" />} onClick={() => setAsked(true)}>
              {t('gpus.connect')}
            </Button>
          )}
        </>
      }
    >
      <div className={css.cards}>
        {gpus.isError && !gpus.data ? <ErrorNote error={gpus.error} retry={() => void gpus.refetch()} /> : null}
        {gpus.isPending ? (
          <div role="status">
            <Text c="dimmed">{t('app.loading', { what: t('gpus.title') })}</Text>
            <Skeleton height={140} mt="sm" radius="md" />
          </div>
        ) : null}
        {none && !asked ? (
          <Empty title={t('gpus.none')} text={t('gpus.noneText')}>
            <Button leftSection={<Icon name="plus" />} onClick={() => setAsked(true)}>
              {t('gpus.connect')}
            </Button>
          </Empty>
        ) : null}
        {asked ? <Connect gpus={gpus.data ?? []} onClose={() => setAsked(false)} /> : null}
        {here.map((gpu) => (
          <GpuCard key={gpu.id} gpu={gpu} />
        ))}
        {gone.length > 0 ? (
          <Fold title={`${t('gpus.past')} (${gone.length})`}>
            <div className={css.cards}>
              {gone.map((gpu) => (
                <GpuCard key={gpu.id} gpu={gpu} />
              ))}
            </div>
          </Fold>
        ) : null}
      </div>
    </Page>
  );
}
