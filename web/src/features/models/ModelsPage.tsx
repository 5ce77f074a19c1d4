import { BackLink } from '@/components/BackLink';
import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Page } from '@/components/Page';
import { Row, Rows } from '@/components/Rows';
import { shortName } from '@/features/generate/ModelPicker';
import { modelsQuery } from '@/features/generate/queries';
import { ago } from '@/lib/format';
import type { Model } from '@/types/api';
import { ActionIcon, Badge, Button, Group, Menu, Skeleton, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useNavigate } from 'react-router';
import { ImportModel } from './ImportModel';
import { deleteModel, exportModel, type LoraForm } from './queries';

export function ModelsPage() {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const models = useQuery(modelsQuery);
  const tuned = models.data?.filter((each) => each.parent !== null).sort((a, b) => b.created - a.created);
  const [importing, modal] = useDisclosure(false);
  const [deleting, setDeleting] = useState<Model | null>(null);
  return (
    <Page
      title={t('models.title')}
      lead={t('models.lead')}
      above={<BackLink to="/training">{t('job.allJobs')}</BackLink>}
      actions={
        <Button variant="default" leftSection={<Icon name="upload" />} onClick={modal.open}>
          {t('models.import')}
        </Button>
      }
    >
      {models.isError ? <ErrorNote error={models.error} retry={() => void models.refetch()} /> : null}
      {models.isPending ? <Skeleton height={90} radius="md" /> : null}
      {tuned?.length === 0 ? (
        <Empty title={t('models.none')} text={t('models.noneText')}>
          <Button component={Link} to="/training/new" leftSection={<Icon name="plus" />}>
            {t('training.new')}
          </Button>
        </Empty>
      ) : null}
      {tuned && tuned.length > 0 ? (
        <Rows label={t('models.title')}>
          {tuned.map((each) => (
            <ModelRow key={each.id} model={each} onDelete={() => setDeleting(each)} />
          ))}
        </Rows>
      ) : null}
      <Dialog opened={importing} onClose={modal.close} title={t('models.import')}>
        <ImportModel onDone={modal.close} />
      </Dialog>
      <Dialog
        opened={deleting !== null}
        onClose={() => setDeleting(null)}
        title={deleting ? t('models.deleteTitle', { name: shortName(deleting) }) : ''}
      >
        {deleting ? (
          <Confirm
            yes={t('models.deleteYes')}
            act={async () => {
              await deleteModel(deleting.id);
              await queryClient.invalidateQueries({ queryKey: modelsQuery.queryKey });
            }}
            onDone={() => setDeleting(null)}
          >
            <Text size="sm">{t('models.deleteText')}</Text>
          </Confirm>
        ) : null}
      </Dialog>
    </Page>
  );
}

function ModelRow({ model, onDelete }: { model: Model; onDelete: () => void }) {
  const { t, i18n } = useTranslation();
  const navigate = useNavigate();
  const exporting = useMutation({ mutationFn: (form?: LoraForm) => exportModel(model.id, form) });
  const name = shortName(model);
  const draws = model.family === 'sd';
  return (
    <Row
      name={name}
      marks={
        model.available ? null : (
          <Badge size="sm" variant="light" color="gray">
            {t('models.offline')}
          </Badge>
        )
      }
      facts={[
        t('models.base', { model: model.parent?.split('/').at(-1) }),
        t('models.made', { when: ago(model.created, i18n.language) }),
        <code key="id">{model.id}</code>,
      ]}
    >
      <Group gap={4} wrap="nowrap">
        <Button
          component={Link}
          to={`/?model=${encodeURIComponent(model.id)}`}
          variant="light"
          size="compact-sm"
          aria-label={t(draws ? 'pictured.drawNamed' : 'models.chatNamed', { name })}
        >
          {t(draws ? 'pictured.draw' : 'models.chat')}
        </Button>
        <Menu position="bottom-end" shadow="md">
          <Menu.Target>
            <ActionIcon
              variant="subtle"
              color="gray"
              size="lg"
              aria-label={t('models.actions', { name })}
              loading={exporting.isPending}
            >
              <Icon name="more" />
            </ActionIcon>
          </Menu.Target>
          <Menu.Dropdown>
            <Menu.Item onClick={() => void navigate('/training/new', { state: { model: model.id } })}>
              {t('models.further')}
            </Menu.Item>
            {draws ? (
              <>
                <Menu.Item onClick={() => exporting.mutate('diffusers')}>{t('models.exportDiffusers')}</Menu.Item>
                <Menu.Item onClick={() => exporting.mutate('kohya')}>{t('models.exportKohya')}</Menu.Item>
              </>
            ) : (
              <Menu.Item onClick={() => exporting.mutate(undefined)}>{t('models.export')}</Menu.Item>
            )}
            <Menu.Item color="red" onClick={onDelete}>
              {t('models.delete')}
            </Menu.Item>
          </Menu.Dropdown>
        </Menu>
      </Group>
      <Dialog opened={exporting.isError} onClose={exporting.reset} title={t('models.export')}>
        <ErrorNote error={exporting.error} retry={() => exporting.mutate(exporting.variables)} />
      </Dialog>
    </Row>
  );
}
